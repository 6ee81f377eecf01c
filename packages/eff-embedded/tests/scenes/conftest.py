"""Scenes that the tests of this folder look at, drawn once."""

import pytest
import torch
from eff_embedded.scenes import SceneConfig, make_camera, make_scene, render

SEEDS = (0, 1, 2, 3, 4, 5)
CONFIG = SceneConfig(num_objects=(6, 8), floating=0.5, spread=0.45, speed=(0.2, 0.6), spin=(20, 90))


@pytest.fixture(scope="session")
def moving_scenes():
    return [make_scene(CONFIG, seed=seed) for seed in SEEDS]


@pytest.fixture(scope="session")
def cameras(moving_scenes):
    return [make_camera(scene, seed=seed, size=(96, 80)) for seed, scene in zip(SEEDS, moving_scenes, strict=True)]


@pytest.fixture(scope="session")
def exact_views(moving_scenes, cameras):
    """The pictures at half a second, in float64."""
    return [render(s, c, 0.5, dtype=torch.float64) for s, c in zip(moving_scenes, cameras, strict=True)]
