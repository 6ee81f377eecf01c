"""Each command on the embedded model, from its files to the pictures that it writes."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from eff_guidance.head_guidance import HeadHunterConfig, HeadSet
from eff_studio.cli import main
from eff_studio.store import read_settings
from PIL import Image


@pytest.fixture
def command(collage, monkeypatch, tmp_path, capsys):
    """``command("generate", ...)`` gives what was printed; the studio's data are those of this test."""

    def load(name, *, dtype, device, data):
        return replace(collage, styles=data / "styles", concepts=data / "concepts")

    monkeypatch.setattr("eff_studio.engine.load_model", load)
    monkeypatch.chdir(tmp_path)

    def run(*args):
        main([*map(str, args), "--data", str(tmp_path / "data")])
        return capsys.readouterr().out

    return run


def points(path):
    return np.array(Image.open(path))


def test_a_layout_and_heads(command, tmp_path):
    layout = [{"prompt": "a dog", "box": [0, 0.3, 0.5, 0.9]}, {"prompt": "an apple", "box": [0.5, 0.3, 1, 0.9]}]
    (tmp_path / "boxes.json").write_text(json.dumps(layout))
    found = HeadSet(
        config=HeadHunterConfig(),
        model="",
        prompts=("a dog",),
        seeds=(0,),
        pool=((1, 1), (5, 0)),
        heads=((1, 1), (5, 0)),
    )
    found.save(tmp_path / "heads.json")
    pictures = []
    for n, more in enumerate(((), ("--layout", "boxes.json"), ("--layout", "boxes.json", "--heads", "heads.json"))):
        command("generate", "a dog and an apple", "--steps", 3, "--out", f"{n}.png", *more)
        pictures.append(points(f"{n}.png"))
    assert not any(np.array_equal(a, b) for a, b in ((pictures[0], pictures[1]), (pictures[1], pictures[2])))
    inside = read_settings((tmp_path / "2.png").read_bytes())["settings"]
    assert len(inside["layers"]) == 2
    assert [weight[:2] for weight in inside["heads"]["weights"]] == [[1, 1], [5, 0]]


def test_insert_and_segment(command, tmp_path):
    command("generate", "a dog", "--steps", 3, "--out", "scene.png")
    Image.new("RGB", (48, 48), (220, 40, 40)).save("subject.png")
    hole = Image.new("L", (128, 128))
    hole.paste(255, (0, 0, 64, 64))
    hole.save("hole.png")
    command("insert", "subject.png", "scene.png", "hole.png", "--prompt", "an apple", "--steps", 2, "--out", "new.png")
    before, after = points("scene.png").astype(int), points("new.png").astype(int)
    assert np.abs(after - before)[:56, :56].mean() > np.abs(after - before)[80:, 80:].mean()
    told = command("segment", "scene.png", "the dog", "--out", "found.png")
    assert "found-1.png" in told
    assert points("found-1.png").shape == (128, 128, 3)
    assert set(np.unique(points("found-2.png"))) <= {0, 255}


def test_learn_makes_words_that_generate_reads(command, tmp_path):
    command("generate", "a dog", "--steps", 3, "--out", "photo.png")
    command("learn", "photo.png", "<rex>=dog", "--name", "mine", "--steps", 1)
    (tmp_path / "s.json").write_text(json.dumps({"concepts": "mine", "steps": 2}))
    command("generate", "a <rex>", "--settings", "s.json", "--out", "rex.png")
    assert read_settings((tmp_path / "rex.png").read_bytes())["settings"]["concepts"] == "mine"


@pytest.mark.slow
def test_another_process_draws_the_same_picture(command, tmp_path):
    """A seed and its picture outlive the process: with a layout and heads, alone and as one of two."""
    box = {"prompt": "a dog", "box": [0, 0.3, 0.5, 0.9]}
    settings = {"layers": [box], "heads": {"weights": [[1, 1, 0.5]], "scale": 2.0}, "steps": 4}
    (tmp_path / "s.json").write_text(json.dumps(settings))
    command("generate", "a dog", "--settings", "s.json", "--seed", 7, "--count", 2, "--out", "here.png")
    words = ["generate", "a dog", "--settings", "s.json", "--seed", "8", "--threads", "1", "--out", "there.png"]
    code = f"from eff_studio.cli import main; main({words!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200)
    assert np.array_equal(points("here-2.png"), points("there.png"))
