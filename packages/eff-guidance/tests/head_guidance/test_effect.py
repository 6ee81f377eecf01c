"""What guidance by heads does on the trained collage diffusion, on paired seeds."""

import itertools

import numpy as np
import pytest
import torch
from eff_guidance.head_guidance import SoftPAGConfig, apply_head_guidance, perturbed_heads

PROMPTS = ["a lion and a rocket", "an owl above a car", "a frog to the left of a crown"]
PLANTED, OTHERS = ((0, 0), (5, 0), (6, 0)), ((1, 2), (3, 1), (7, 3))


def draw(pipe, config):
    with apply_head_guidance(pipe, config, order=1):
        noise = [torch.Generator().manual_seed(7 + i) for i in range(len(PROMPTS))]
        return pipe(PROMPTS, generator=noise, num_inference_steps=6, output_type="pt", guidance_scale=1.0).images


def distances(pictures, others):
    return [float((a - b).square().mean()) for a, b in zip(pictures, others, strict=True)]


@pytest.mark.slow
@torch.no_grad()
def test_guidance_by_handicapped_heads_undoes_the_handicap(collages):
    """A quarter of a step of damage is undone, to first order, by a third of the way from the other three quarters."""
    nothing = SoftPAGConfig(heads=())
    clean = draw(collages, nothing)
    with perturbed_heads(collages.transformer, SoftPAGConfig(heads=PLANTED, strength=0.25), order=0):
        hurt = distances(draw(collages, nothing), clean)
        right = distances(draw(collages, SoftPAGConfig(heads=PLANTED, scale=1 / 3)), clean)
        wrong = distances(draw(collages, SoftPAGConfig(heads=OTHERS, scale=1 / 3)), clean)
    assert all(a < b for a, b in zip(right, hurt, strict=True)), (right, hurt)
    assert np.mean(right) < np.mean(wrong)


@pytest.mark.slow
@torch.no_grad()
def test_strength_moves_pictures_further_and_further(collages):
    plain = draw(collages, SoftPAGConfig(heads=()))
    moved = [
        np.mean(distances(draw(collages, SoftPAGConfig(heads="all", scale=1.0, strength=u)), plain))
        for u in (0.0, 0.1, 0.3, 1.0)
    ]
    assert moved[0] == 0
    assert all(a < b for a, b in itertools.pairwise(moved)), moved
