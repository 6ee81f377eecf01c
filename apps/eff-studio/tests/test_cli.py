"""Commands in this process, on the fake model."""

import json
import re

import numpy as np
import pytest
from eff_studio.cli import main
from eff_studio.store import read_settings
from PIL import Image


@pytest.fixture
def command(fake, monkeypatch, capsys):
    """``command("generate", ...)`` gives (exit status, what was printed)."""
    monkeypatch.setattr("eff_studio.engine.load_model", lambda *args, **settings: fake)

    def run(*args):
        try:
            main([str(arg) for arg in args])
            status = 0
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        return status, out + err + (status if isinstance(status, str) else "")

    return run


def test_generate_writes_pictures_with_their_settings(command, tmp_path):
    out = tmp_path / "new" / "a.png"
    status, text = command("generate", "a dog", "--seed", 4, "--count", 2, "--steps", 3, "--out", out)
    assert status == 0
    paths = [out.with_name("a-1.png"), out.with_name("a-2.png")]
    assert text.split() == [str(path) for path in paths]
    inside = read_settings(paths[0].read_bytes())
    assert inside["settings"]["seed"] == 4
    command("generate", "a dog", "--seed", 5, "--steps", 3, "--out", out)
    assert np.array_equal(np.array(Image.open(out)), np.array(Image.open(paths[1])))


def test_settings_of_a_file_hold_unless_the_command_says_otherwise(command, fake, tmp_path):
    settings, layout, out = tmp_path / "s.json", tmp_path / "l.json", tmp_path / "a.png"
    settings.write_text(json.dumps({"prompt": "a cat", "steps": 2, "guidance": 7.0, "negative": "rain"}))
    status, _ = command("generate", "--settings", settings, "--guidance", 3, "--out", out)
    assert status == 0
    assert fake.pipe.calls == [{"prompt": "a cat", "steps": 2, "guidance_scale": 3.0, "negative_prompt": "rain"}]
    layout.write_text(json.dumps([{"prompt": "a dog", "box": [0, 0, 1, 2]}]))
    assert "box=" in command("generate", "--layout", layout)[1]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("generate",), "no layers"),
        (("generate", "x", "--steps", "0"), "steps=0"),
        (("generate", "x", "--settings", "missing.json"), "cannot be read"),
        (("generate", "x", "--heads", "missing.json"), "cannot be read"),
        (("generate", "boom2", "--settings", "{size}"), "64 x 64 only"),
        (("segment", "missing.png", "dog"), "missing.png"),
        (("segment", "missing.png", " "), "phrase is empty"),
        (("insert", "a.png", "b.png", "c.png"), "a.png"),
        (("insert", "a.png", "b.png", "c.png", "--strength", "2"), "strength"),
        (("search-heads", "a dog"), "the judge reads pictures of collage-diffusion only"),
        (("learn", "missing.png", "<rex>=dog"), "missing.png"),
        (("generate", "x", "--threads", "0"), "threads=0"),
        (("serve", "--api-key-file", "missing.txt"), "key file cannot be read"),
    ],
)
def test_what_fails_says_why(command, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "size.json").write_text('{"width": 128, "height": 128}')
    status, text = command(*(arg.replace("{size}", "size.json") for arg in args))
    assert status not in (0, None)
    assert words in re.sub(r"\s+", " ", text)
    assert "Traceback" not in text


def test_unknown_arguments_are_refused(command):
    assert command("generate", "x", "--sampler", "best")[0] == 2
