"""Settings and layouts: limits, JSON, files."""

import json

import pytest
import torch
from eff_guidance.layerbind import Layer, LayerBindConfig, Layout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eta1": -0.1}, "eta1=-0.1"),
        ({"eta2": 1.2}, "eta2=1.2"),
        ({"eta1": 0.8}, "eta1=0.8 is above eta2=0.7"),
        ({"opacity": 2}, "opacity"),
        ({"gamma": 0}, "gamma"),
        ({"poisson_lambda": -1}, "poisson_lambda"),
        ({"alpha_mode": "soft"}, "'estimate', 'direct'"),
        ({"hard_blocks": (-1,)}, "counted from 0"),
    ],
)
def test_bad_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        LayerBindConfig(**changes)


def test_settings_travel_as_json():
    config = LayerBindConfig(eta1=0.3, hard_blocks=(0, 2), alpha_mode="direct")
    assert LayerBindConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_switches_round_up():
    assert LayerBindConfig(eta1=0.2, eta2=0.7).switches(50) == (10, 35)
    assert LayerBindConfig(eta1=0.2, eta2=0.7).switches(4) == (1, 3)
    assert LayerBindConfig(eta1=0, eta2=0).switches(9) == (0, 0)
    # 0.07 * 100 is a little more than 7 in floating point
    assert LayerBindConfig(eta1=0.07, eta2=0.7).switches(100) == (7, 70)


def test_hard_blocks():
    assert sorted(LayerBindConfig().blocks_of(57, flux=True)) == [0, 15, 18, 42, 45, 48, 50, 53, 54]
    assert sorted(LayerBindConfig().blocks_of(38, flux=False)) == [0, 11, 14, 19, 21, 24, 29, 32, 34]
    wanted = [round(b * 18 / 37) for b in (0, 11, 14, 19, 21, 24, 29, 32, 34)]
    assert sorted(LayerBindConfig().blocks_of(19, flux=False)) == wanted
    with pytest.raises(ValueError, match=r"no block \[3\]"):
        LayerBindConfig(hard_blocks=(0, 3)).blocks_of(3, flux=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Layer(prompt="a"), "either a box or a mask"),
        (lambda: Layer(prompt="a", box=(0, 0, 1, 1), mask=torch.ones(2, 2)), "either a box or a mask"),
        (lambda: Layer(prompt="a", box=(0.5, 0, 0.5, 1)), "box=.0.5, 0.0, 0.5, 1.0"),
        (lambda: Layer(prompt="a", box=(0, 0, float("nan"), 1)), "box="),
        (lambda: Layer(prompt="a", mask=torch.ones(3)), "mask .3."),
        (lambda: Layer(prompt="a", mask=torch.full((2, 2), 2.0)), "outside of 0 to 1"),
        (lambda: Layout(layers=(Layer(prompt="a", box=(2, 0, 3, 1)),)), "lies outside"),
        (lambda: Layout(size=(0, 1)), "size"),
    ],
)
def test_bad_layouts(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_layouts_travel_as_json(tmp_path):
    layout = Layout(
        background="a meadow", size=(128, 128),
        layers=(
            Layer(prompt="a bee", box=(1, 2, 30, 40), negative="a wasp"),
            Layer(prompt="a mouse", box=(0, 0, 64, 64)),
        ),
    )  # fmt: skip
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    layout.save(tmp_path / "layout.json")
    assert json.loads((tmp_path / "layout.json").read_text())["background"] == "a meadow"
    assert Layout.load(tmp_path / "layout.json") == layout
    by_hand = Layout.from_dict({"layers": [{"prompt": "a bee", "box": [0, 0, 1, 1]}]})
    assert by_hand.layers[0].box == (0, 0, 1, 1)
    with pytest.raises(ValueError, match=r"no \['colour'\]"):
        Layout.from_dict({"layers": [{"prompt": "a bee", "box": [0, 0, 1, 1], "colour": "red"}]})


def test_layouts_with_masks_are_saved(tmp_path):
    mask = torch.eye(4) > 0
    Layout(layers=(Layer(prompt="a bee", mask=mask),)).save(tmp_path / "layout.safetensors")
    assert torch.equal(Layout.load(tmp_path / "layout.safetensors").layers[0].mask, mask)


def test_reorder_and_edit():
    layout = Layout(layers=tuple(Layer(prompt=p, box=(0, 0, 1, 1)) for p in "abc"))
    assert [x.prompt for x in layout.reorder([2, 0, 1]).layers] == ["c", "a", "b"]
    assert [x.prompt for x in layout.edit(1, prompt="d").layers] == ["a", "d", "c"]
    assert layout.caption == "a, b, c"
    with pytest.raises(ValueError, match="each of 0 to 2 once"):
        layout.reorder([0, 0, 1])
    with pytest.raises(IndexError, match="layer=3"):
        layout.edit(3, prompt="x")
