"""The embedded model: seeds, sizes, methods around it, and that it is left as it was."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
from eff_studio.engine import CancelledError, run_work
from eff_studio.engine.draw import _dress
from eff_studio.work import Generate, Heads, Insert, LayerBox, Segment
from PIL import Image

PROMPT = "a dog and an apple"
LAYERS = (LayerBox(prompt="a dog", box=(0, 0.3, 0.5, 0.9)), LayerBox(prompt="an apple", box=(0.5, 0.3, 1, 0.9)))


@pytest.fixture
def draw(collage):
    """``draw(work)`` gives arrays of its pictures; what was reported is ``draw.told``."""

    def do(work, *, files=(), **more):
        do.told = []
        more = {"cancelled": lambda: False, **more}
        do.result = run_work(collage, work, open_picture=dict(files).__getitem__, report=do.told.append, **more)
        return [np.array(image) for image in do.result.images]

    return do


@pytest.fixture(scope="module")
def plain(collage):
    work = Generate(prompt=PROMPT, steps=4, seed=11)
    return np.array(
        run_work(collage, work, open_picture=None, report=lambda p: None, cancelled=lambda: False).images[0]
    )


def test_a_seed_gives_its_picture_alone_and_in_a_batch(draw, plain):
    batch = draw(Generate(prompt=PROMPT, steps=4, seed=10, count=2), previews=lambda: len(draw.told) % 2 == 0)
    assert np.array_equal(batch[1], plain)
    assert not np.array_equal(batch[0], plain)
    assert [(p.step, p.steps) for p in draw.told] == [(i + 1, 8) for i in range(8)]
    assert [p.preview is not None for p in draw.told] == [True, False] * 4
    assert draw.told[0].preview.size == (128, 128)
    assert draw.told[0].seconds_left > 0


def test_a_layout_and_heads_change_the_picture_and_leave_the_model(draw, plain):
    layout = draw(Generate(prompt=PROMPT, layers=LAYERS, steps=4, seed=11))[0]
    heads = draw(Generate(prompt=PROMPT, heads=Heads(weights=((1, 0, 0.5), (4, 2, 1.0))), steps=4, seed=11))[0]
    off = draw(Generate(prompt=PROMPT, heads=Heads(weights=((1, 0, 0.5),), scale=0), steps=4, seed=11))[0]
    some = Heads(weights=((1, 0, 0.5), (4, 2, 1.0)))
    both = Generate(prompt=PROMPT, layers=LAYERS, heads=some, steps=4, seed=10, count=2)
    none = Generate(prompt=PROMPT, layers=LAYERS, heads=replace(some, scale=0.0), steps=4, seed=11)
    guided = draw(both)[1]
    assert not any(np.array_equal(guided, other) for other in (plain, layout, heads))
    assert np.array_equal(guided, draw(replace(both, seed=11, count=1))[0])
    assert np.array_equal(draw(none)[0], layout)
    assert not np.array_equal(layout, plain)
    assert not np.array_equal(heads, plain)
    assert np.array_equal(off, plain)
    assert np.array_equal(draw(Generate(prompt=PROMPT, steps=4, seed=11))[0], plain)


def test_settings_reach_the_pipeline(draw, plain):
    for change in ({"guidance": 1.5}, {"negative": "a cat"}, {"steps": 3}, {"prompt": "a cat"}):
        work = Generate(**{"prompt": PROMPT, "steps": 4, "seed": 11, **change})
        assert not np.array_equal(draw(work)[0], plain), change
    layout = {"layers": LAYERS, "steps": 4}
    assert not np.array_equal(draw(Generate(**layout))[0], draw(Generate(**layout, opacity=0.0))[0])


HEADS = {"heads": Heads(weights=((1, 0, 0.5),))}


@pytest.mark.parametrize("more", [{}, {"layers": LAYERS}, HEADS, {"layers": LAYERS, **HEADS}])
def test_cancelling_ends_after_the_step_and_leaves_the_model(draw, plain, more):
    asked = []

    def cancelled():
        asked.append(1)
        return len(asked) > 2  # before the work, and after its first step

    with pytest.raises(CancelledError):
        draw(Generate(prompt=PROMPT, steps=50, **more), cancelled=cancelled)
    assert len(draw.told) == 1
    assert np.array_equal(draw(Generate(prompt=PROMPT, steps=4, seed=11))[0], plain)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 256, "height": 256}, "128 x 128 only"),
        ({"heads": Heads(weights=((99, 0, 1.0),))}, "99"),
        ({"heads": Heads(weights=((0, 99, 1.0),))}, "99"),
        ({"concepts": "none"}, "none"),
    ],
)
def test_what_does_not_fit_the_model(draw, plain, change, words):
    with pytest.raises(ValueError, match=words):
        draw(Generate(prompt=PROMPT, steps=2, **change))
    assert np.array_equal(draw(Generate(prompt=PROMPT, steps=4, seed=11))[0], plain)


@pytest.mark.parametrize("with_", ["layers", "heads"])
def test_concepts_go_with_layers_and_with_heads(collage, draw, plain, tmp_path, with_):
    from eff_studio.search import learn

    Image.fromarray(plain).save(tmp_path / "given.png")
    assert learn(collage, tmp_path / "given.png", ["<rex>=dog"], tmp_path / "rex", steps=1) == 0
    studio = replace(collage, concepts=tmp_path)
    more = {"layers": LAYERS} if with_ == "layers" else {"heads": Heads(weights=((1, 0, 0.5),))}
    pictures = []
    for work in (
        Generate(prompt="a <rex> and an apple", steps=2, concepts="rex", **more),
        Generate(prompt="a <rex> and an apple", steps=2, concepts="rex"),
    ):
        found = run_work(studio, work, open_picture=None, report=lambda p: None, cancelled=lambda: False)
        pictures.append(np.array(found.images[0]))
    assert not np.array_equal(*pictures)
    assert np.array_equal(draw(Generate(prompt=PROMPT, steps=4, seed=11))[0], plain)


def test_methods_come_off_when_one_cannot_be_put_on(collage, draw, plain):
    work = Generate(prompt=PROMPT, layers=LAYERS, heads=Heads(weights=((99, 0, 1.0),)))
    with pytest.raises(ValueError, match="99"), contextlib.ExitStack() as stack:
        _dress(collage, work, stack)
    assert np.array_equal(draw(Generate(prompt=PROMPT, steps=4, seed=11))[0], plain)


def test_insert_paints_the_hole_only(draw, plain):
    hole = Image.new("L", (128, 128))
    hole.paste(255, (0, 0, 64, 64))
    files = {
        "target": Image.fromarray(plain), "subject": Image.fromarray(plain).crop((0, 0, 64, 96)), "mask": hole,
    }  # fmt: skip
    work = Insert(subject="subject", target="target", mask="mask", prompt="a dog", steps=4)
    found = draw(work, files=files)[0]
    assert found.shape == (128, 128, 3)
    outside = np.abs(found[72:].astype(int) - plain[72:])
    inside = np.abs(found[:56, :56].astype(int) - plain[:56, :56])
    assert outside.mean() < inside.mean()
    assert [p.step for p in draw.told] == [1, 2, 3, 4]
    files["mask"] = Image.new("L", (64, 64))
    with pytest.raises(ValueError, match="the mask is 64 x 64"):
        draw(work, files=files)


def test_segment_points(draw, plain):
    heat, mask = draw(Segment(picture="p", phrase="dog"), files={"p": Image.fromarray(plain)})
    assert all(isinstance(image, Image.Image) for image in draw.result.images)
    assert heat.shape == (128, 128, 3)
    assert mask.shape[:2] == (128, 128)
    assert set(np.unique(mask)) <= {0, 255}
    x, y = draw.result.facts["point"]
    assert 0 <= x <= 128
    assert 0 <= y <= 128
