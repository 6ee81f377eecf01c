"""What is learnt or searched: styles, and heads from a search to a picture."""

from dataclasses import replace

import numpy as np
import pytest
from eff_studio.engine import run_work
from eff_studio.work import Generate, Heads, LayerBox, Style
from PIL import Image

LAYERS = (LayerBox(prompt="a dog", box=(0, 0.3, 0.5, 0.9)),)
HEADS = {"heads": Heads(weights=((1, 0, 0.5),))}
WITH = {"alone": {}, "layers": {"layers": LAYERS}, "heads": HEADS, "both": {"layers": LAYERS, **HEADS}}


def draw(model, **settings):
    work = Generate(**{"prompt": "a dog", "steps": 3, **settings})
    return np.array(run_work(model, work, open_picture=None, report=lambda p: None, cancelled=lambda: False).images[0])


@pytest.fixture(scope="module")
def styled(collage, tmp_path_factory):
    """The embedded model with a style "ink" of random numbers."""
    from eff_guidance.pokefusion import StyleAttentionConfig, add_style_attention

    folder = tmp_path_factory.mktemp("styles")
    handle = add_style_attention(collage.pipe, StyleAttentionConfig(num_styles=1, gate_init=0.5))
    handle.save_pretrained(folder / "ink")
    handle.remove()
    return replace(collage, styles=folder)


@pytest.mark.parametrize("with_", WITH)
def test_a_style_acts_by_its_strength_and_is_gone_after(collage, styled, with_):
    plain = draw(collage, **WITH[with_])
    full, half, off = (draw(styled, **WITH[with_], style=Style(name="ink", strength=s)) for s in (1.0, 0.5, 0.0))
    assert not np.array_equal(full, plain)
    assert not np.array_equal(full, half)
    assert np.array_equal(off, plain)
    assert np.array_equal(draw(collage, **WITH[with_]), plain)


def test_facts_name_styles(styled):
    assert styled.facts()["styles"] == ["ink"]
    with pytest.raises(ValueError, match=r"no 'oil' among the studio's styles: \['ink'\]"):
        draw(styled, style=Style(name="oil"))


def test_heads_are_searched_and_used(collage, tmp_path, monkeypatch, capsys):
    from eff_studio.cli import main

    monkeypatch.setattr("eff_studio.engine.load_model", lambda *args, **settings: collage)
    out, picture = str(tmp_path / "heads.json"), tmp_path / "a.png"
    main(["search-heads", "a dog", "--out", out, "--heads", "2", "--seeds", "1", "--steps", "1"])
    found = capsys.readouterr().out.split("\n")
    assert sum(line.startswith("layer ") for line in found) == 2
    main(["generate", "a dog", "--heads", out, "--steps", "3", "--out", str(picture)])
    assert not np.array_equal(np.array(Image.open(picture)), draw(collage))
    capsys.readouterr()
    main(["search-heads", "a dog", "--out", out, "--heads", "2", "--seeds", "1", "--steps", "1"])  # it is finished
    assert sum(line.startswith("layer ") for line in capsys.readouterr().out.split("\n")) == 2
