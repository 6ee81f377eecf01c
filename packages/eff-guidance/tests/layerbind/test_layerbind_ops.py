"""Attention of parts, compositing, outlines, blending."""

import pytest
import torch
from eff_guidance.layerbind import (
    Grid,
    Layer,
    LayerBindConfig,
    Layout,
    blend_branches,
    composite_layers,
    contextual_attention,
    estimate_foreground_alpha,
    otsu_threshold,
    region_of,
    regions_of,
    screened_poisson,
)
from eff_guidance.layerbind.alpha import central_component
from torch.nn.functional import scaled_dot_product_attention


def full(q, k, v, keep):
    """Masked attention written out."""
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return logits.masked_fill(~keep, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("heads_first", [True, False])
def test_contextual_attention_is_masked_attention(heads_first):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 12, 8, dtype=torch.float64)
    ask = torch.tensor([7, 2, 3])
    others = torch.tensor([i for i in range(12) if i not in ask])
    give = (lambda x: x) if heads_first else (lambda x: x.transpose(1, 2))
    for seen in (others, torch.tensor([0, 11, 5]), torch.tensor([2, 3, 0])):  # the last holds some that ask
        keep = torch.zeros(12, 12, dtype=torch.bool)
        keep[:, torch.cat([ask, seen])] = True
        wanted = full(q, k, v, keep)[:, :, ask]
        found = give(contextual_attention(*(give(x) for x in (q, k, v)), ask, seen, num_heads_first=heads_first))
        assert (found - wanted).abs().max() <= 1e-12
    assert (
        full(q, k, v, torch.ones(12, 12, dtype=torch.bool)) - scaled_dot_product_attention(q, k, v)
    ).abs().max() < 1e-12


def test_layers_are_composited_in_order():
    base, at = torch.zeros(1, 1, 4, 1), [torch.tensor([1, 2]), torch.tensor([2, 3])]
    layers = [torch.ones(1, 1, 2, 1), torch.full((1, 1, 2, 1), 2.0)]
    masks = [torch.ones(1, 2, dtype=torch.bool)] * 2
    found = composite_layers(base, layers, masks, 0.7, at).flatten()
    assert torch.allclose(found, torch.tensor([0, 0.7, 1.61, 1.4]))
    assert torch.equal(composite_layers(base, layers, masks, 0.0, at), base)
    assert composite_layers(base, layers, masks, 1.0, at).flatten().tolist() == [0, 1, 2, 2]
    hidden = [masks[0], torch.tensor([[False, True]])]
    assert composite_layers(base, layers, hidden, 1.0, at).flatten().tolist() == [0, 1, 1, 2]
    half = composite_layers(base.bfloat16(), [x.bfloat16() for x in layers], masks, 0.7, at)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.flatten(), found.bfloat16())


def test_smoothing_worked_example():
    spike = torch.zeros(3, 3)
    spike[1, 1] = 1
    smooth = screened_poisson(spike, 0.5)
    assert smooth[1, 1].item() == pytest.approx(0.1474, abs=5e-5)
    assert smooth[0, 1].item() == pytest.approx(0.0408, abs=5e-5)
    assert smooth[0, 0].item() == pytest.approx(0.0181, abs=5e-5)


def test_otsu():
    values = torch.tensor([1.0] * 5 + [9.0] * 3)
    threshold = otsu_threshold(values)
    assert (values >= threshold).tolist() == [False] * 5 + [True] * 3
    assert otsu_threshold(torch.ones(7)) is None
    torch.manual_seed(0)
    two = torch.cat([torch.randn(400), 8 + torch.randn(200)])
    assert 2 < otsu_threshold(two) < 6


def square(side=12):
    return region_of(Layer(prompt="a", box=(0, 0, 1, 1)), (1, 1), Grid(side, side))


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_alpha_is_the_distance_to_twice_gamma(gamma):
    """Hardly smoothed, a shape that differs half as much has alpha .5 ** (2 gamma)."""
    region, branch = square(), torch.zeros(1, 12, 12, 1)
    branch[:, 3:9, 4:10] = 4.0
    branch[:, 3:9, 7:10] = 8.0
    alpha, mask = estimate_foreground_alpha(
        branch.flatten(1, 2), torch.zeros(1, 144, 1), region, gamma=gamma, poisson_lambda=1e5
    )
    found = alpha.view(12, 12)
    assert float(found[5, 8]) == pytest.approx(1.0, abs=0.02)
    assert float(found[5, 5]) == pytest.approx(0.5 ** (2 * gamma) if mask.view(12, 12)[5, 5] else 0.0, abs=0.02)


def test_an_outline_is_found():
    torch.manual_seed(0)
    region = square()
    current = torch.randn(2, 144, 16)
    shape = torch.zeros(12, 12, dtype=torch.bool)
    shape[3:9, 4:10] = True
    branch = current + 0.05 * torch.randn(2, 144, 16) + shape.flatten()[:, None] * 3.0
    alpha, mask = estimate_foreground_alpha(branch, current, region)
    assert alpha.shape == mask.shape == (2, 144)
    assert (alpha >= 0).all()
    assert (alpha.amax(1) == 1).all()
    assert (alpha[~mask] == 0).all()
    for each in mask.view(2, 12, 12):
        assert each[shape].all()
        grown = torch.nn.functional.max_pool2d(shape.float()[None], 5, 1, 2)[0] > 0
        assert not each[~grown].any()


def test_a_flat_map_takes_the_whole_region():
    region = square(5)
    zero = torch.zeros(1, 25, 3)
    alpha, mask = estimate_foreground_alpha(zero, zero, region)
    assert mask.all()
    assert (alpha == 1).all()


def test_only_the_part_in_the_middle_is_kept():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[0, :2] = mask[3:5, 3:5] = True
    kept = central_component(mask)
    assert kept.sum() == 4
    assert kept[3:5, 3:5].all()
    edge = torch.zeros(8, 8, dtype=torch.bool)
    edge[0] = True
    assert torch.equal(central_component(edge), edge)
    region = square(8)
    current = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(0)) * 0.01
    spots = torch.zeros(8, 8)
    spots[:2, :2] = spots[3:6, 3:6] = 2
    found = {
        core: estimate_foreground_alpha(current + spots.flatten()[:, None], current * 1.1, region, core_component=core)[
            1
        ]
        for core in (True, False)
    }
    assert found[True].sum() <= found[False].sum()


def two():
    layout = Layout(layers=(Layer(prompt="front", box=(0, 0, 0.5, 0.5)), Layer(prompt="back", box=(0.25, 0.25, 1, 1))))
    return layout, regions_of(layout, Grid(8, 8))


def test_direct_paste_shows_the_front_layer():
    torch.manual_seed(0)
    layout, (back, front) = two()
    background = torch.randn(2, 64, 5)
    branches = [torch.randn(2, len(r.idx), 5) for r in (back, front)]
    config = LayerBindConfig(alpha_mode="direct")
    latents = blend_branches(background, branches, [back, front], config).latents
    assert torch.equal(latents[:, front.idx], branches[1])
    alone = [i for i, t in enumerate(back.idx.tolist()) if t not in front.idx.tolist()]
    assert torch.equal(latents[:, back.idx[alone]], branches[0][:, alone])
    neither = [t for t in range(64) if t not in [*back.idx.tolist(), *front.idx.tolist()]]
    assert torch.equal(latents[:, neither], background[:, neither])
    swapped = regions_of(layout.reorder([1, 0]), Grid(8, 8))
    assert torch.equal(swapped[1].idx, back.idx)
    turned = blend_branches(background, branches[::-1], swapped, config).latents
    assert torch.equal(turned[:, back.idx], branches[0])


def test_estimated_paste_is_between_and_untouched_layers_are_whole():
    torch.manual_seed(0)
    _, regions = two()
    background = torch.zeros(1, 64, 5)
    branches = [torch.randn(1, len(r.idx), 5) for r in regions]
    branches[1][:, 5:] = 0
    made = blend_branches(background, branches, regions, LayerBindConfig(core_component=False))
    assert (made.alphas[0] == 1).all()  # it covers none before it
    before = blend_branches(background, branches[:1], regions[:1], LayerBindConfig()).latents[:, regions[1].idx]
    alpha = made.alphas[1][..., None]
    assert torch.allclose(made.latents[:, regions[1].idx], alpha * branches[1] + (1 - alpha) * before)
    assert 0 < made.masks[1].sum() < made.masks[1].numel()


def test_a_given_alpha_is_used():
    layer = Layer(prompt="a", box=(0, 0, 1, 1), alpha=torch.tensor([[0.0, 1.0], [0.25, 1.0]]))
    region = region_of(layer, (1, 1), Grid(2, 2))
    made = blend_branches(torch.zeros(3, 4, 1), [torch.ones(3, 4, 1)], [region], LayerBindConfig())
    assert made.latents[0].flatten().tolist() == [0, 1, 0.25, 1]
    assert made.masks[0][0].tolist() == [False, True, True, True]
