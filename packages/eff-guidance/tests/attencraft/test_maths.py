"""Worked examples of the pure parts: losses, refinement, masks, their renewal, and the choice of prompts."""

import collections
import json
import math

import pytest
import torch
from eff_guidance.attencraft import (
    AttenCraftConfig,
    Concept,
    ConceptSampler,
    MaskKeeper,
    attention_js_loss,
    js_divergence,
    make_concept_masks,
    masked_denoising_loss,
    normalize_map,
    refine_maps,
    resize_map,
    split_masks,
    ssim,
    tie_masks_to_tokens,
)

A, B = Concept(token="<a>", init_word="cat"), Concept(token="<b>", init_word="dog")


def half():
    mask = torch.zeros(1, 32, 32, dtype=torch.float64)
    mask[:, :, :16] = 1
    return mask


def test_js_worked_examples():
    mask = half()
    assert float(attention_js_loss(mask, mask)) == 0
    assert float(attention_js_loss(mask, 1 - mask)) == pytest.approx(0.11094, abs=1e-5)
    assert float(attention_js_loss(torch.zeros_like(mask), mask)) == pytest.approx(0.02854, abs=1e-5)
    one = torch.tensor([[[1.0, 0], [0, 0]]], dtype=torch.float64)
    assert float(attention_js_loss(one, one.flip(1, 2))) == pytest.approx(0.07214, abs=1e-5)
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.rand(50, 9, dtype=torch.float64, generator=draw).softmax(-1) for _ in range(2))
    torch.testing.assert_close(js_divergence(p, q), js_divergence(q, p), rtol=0, atol=1e-15)
    ends = torch.eye(4, dtype=torch.float64)
    assert float(js_divergence(ends[0], ends[1])) == pytest.approx(math.log(2), abs=1e-12)
    with pytest.raises(ValueError, match="wanted"):
        attention_js_loss(mask, mask[0])


def test_js_has_the_right_gradient():
    maps = torch.rand(2, 4, 4, dtype=torch.float64, requires_grad=True)
    masks = (torch.rand(2, 4, 4) > 0.5).double()
    assert torch.autograd.gradcheck(lambda m: attention_js_loss(m, masks), maps)


def test_refinement():
    draw = torch.Generator().manual_seed(0)
    cross = torch.rand(3, 4, 4, dtype=torch.float64, generator=draw)
    identity = torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(refine_maps(cross, identity, (4, 4)), normalize_map(cross**2), rtol=0, atol=1e-12)
    # two regions, left and right: a map that hits one place of the left covers all of it, evenly
    side = (torch.arange(16) % 4 < 2).double()
    blocks = (side[:, None] == side[None, :]).double()
    spot = torch.zeros(1, 4, 4, dtype=torch.float64)
    spot[0, 3, 1] = 0.7
    torch.testing.assert_close(refine_maps(spot, blocks, (4, 4))[0], side.reshape(4, 4), rtol=0, atol=1e-12)
    # against the formula, row by row
    s = torch.rand(16, 16, dtype=torch.float64, generator=draw)
    low = (s - s.min()) / (s.max() - s.min())
    w = low @ low @ low @ low
    w = (w - w.min()) / (w.max() - w.min())
    p = (cross**2).flatten(1)
    p = (p - p.amin(1, keepdim=True)) / (p.amax(1, keepdim=True) - p.amin(1, keepdim=True))
    r = torch.stack([torch.stack([(w[y] * m).sum() for y in range(16)]) for m in p])
    r = (r - r.amin(1, keepdim=True)) / (r.amax(1, keepdim=True) - r.amin(1, keepdim=True))
    torch.testing.assert_close(refine_maps(cross, s, (4, 4)), r.unflatten(1, (4, 4)))
    half_precision = refine_maps(cross.half(), (9 * s).half(), (4, 4))
    assert half_precision.dtype == torch.float32
    assert half_precision.isfinite().all()
    with pytest.raises(ValueError, match="flat"):
        refine_maps(torch.ones(1, 4, 4), s, (4, 4))
    with pytest.raises(ValueError, match=r"wanted \[K, h, w\]"):
        refine_maps(cross, s, (4, 5))
    big = resize_map(torch.tensor([[[0.0, 1], [1, 0]]]), (8, 8))
    assert big.min() >= 0
    assert big.max() <= 1


def test_mask_rule_by_hand():
    maps = torch.tensor([[[0.9, 0.5]], [[0.2, 0.45]], [[0.1, 0.1]]])
    assert make_concept_masks(maps, 0.1).tolist() == [[0, -1]]
    assert make_concept_masks(maps, 0.04).tolist() == [[0, 0]]
    draw = torch.rand(4, 9, 9, generator=torch.Generator().manual_seed(0))
    last = None
    for threshold in (0.0, 0.05, 0.2, 0.5):
        masks = split_masks(make_concept_masks(draw, threshold), 4)
        assert masks.sum(0).max() <= 1
        if last is not None:
            assert (masks <= last).all()
            assert masks.sum() < last.sum()
        last = masks
    # brute force: more than the threshold above every other one
    labels = make_concept_masks(draw, 0.05)
    for i in range(4):
        others = [j for j in range(4) if j != i]
        assert torch.equal(labels == i, (draw[i] - draw[others] > 0.05).all(0))
    with pytest.raises(ValueError, match="at least 2"):
        make_concept_masks(draw[:1])


def three_maps(size=12):
    """Refined maps of a left object, a right object and the background around them."""
    maps = torch.zeros(3, size, size)
    maps[0, 3:9, 1:5] = 0.9
    maps[1, 3:9, 7:11] = 0.8
    maps[2] = 0.7 * (1 - maps[:2].amax(0).ceil())
    return maps


def test_ties():
    maps = three_maps()
    masks = split_masks(make_concept_masks(maps), 3)
    assert tie_masks_to_tokens(maps, masks) == [0, 1, 2]
    swapped = maps[[1, 0, 2]]
    assert torch.equal(split_masks(make_concept_masks(swapped), 3), masks[[1, 0, 2]])
    with pytest.raises(ValueError, match="belong to the tokens"):
        tie_masks_to_tokens(maps, masks[[0, 0, 2]])
    with pytest.raises(ValueError, match="empty"):
        tie_masks_to_tokens(maps, masks * torch.tensor([1.0, 0, 1])[:, None, None])


def test_ssim_is_that_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    draw = torch.Generator().manual_seed(0)
    one = (torch.rand(16, 20, generator=draw) > 0.5).double()
    for other in (one, 1 - one, torch.rand(16, 20, generator=draw).double()):
        wanted = metrics.structural_similarity(one.numpy(), other.numpy(), win_size=7, data_range=1.0)
        assert ssim(one, other) == pytest.approx(wanted, abs=1e-9)
    flat = (0.5 + 1e-3 * torch.rand(2, 16, 20, generator=draw)).float()
    assert ssim(*flat) == ssim(*flat.double())  # float32 would lose such variances
    with pytest.raises(ValueError, match="at least 7"):
        ssim(one[:6], one[:6])


def test_new_masks_must_look_like_the_old():
    keeper = MaskKeeper()
    assert [step for step in range(45) if keeper.due(step)] == [0, 20, 40]
    with pytest.raises(ValueError, match="masks"):
        keeper.offer(torch.zeros(3, 12, 12) + torch.tensor([1.0, 0, 0])[:, None, None])
    assert keeper.offer(three_maps())
    first = keeper.masks
    near = three_maps()
    near[0, 3, 1] = 0  # one place less
    assert keeper.offer(near)
    assert not torch.equal(keeper.masks, first)
    second = keeper.masks
    assert not keeper.offer(three_maps().roll(3, 1))  # far away
    assert not keeper.offer(torch.zeros(3, 12, 12) + torch.tensor([1.0, 0, 0])[:, None, None])  # no ties
    assert keeper.masks is second
    other = MaskKeeper()
    other.load_state_dict(keeper.state_dict())
    assert other.masks is second


def test_uniform_sampler():
    sampler = ConceptSampler([A, B], seed=1)
    seen = collections.Counter(sampler.next().concepts for _ in range(30_000))
    assert seen[(0,)] / 30_000 == pytest.approx(1 / 3, abs=0.01)
    assert seen[(1,)] / 30_000 == pytest.approx(1 / 3, abs=0.01)
    assert (seen[(0, 1)] + seen[(1, 0)]) / 30_000 == pytest.approx(1 / 3, abs=0.01)
    assert min(seen[(0, 1)], seen[(1, 0)]) > 4500
    three = ConceptSampler([A, B, Concept(token="<c>", init_word="red", words="red ball")])
    sizes = collections.Counter(len(three.next().concepts) for _ in range(9000))
    assert all(abs(sizes[n] / 9000 - 1 / 3) < 0.02 for n in (1, 2, 3))
    assert three.all().prompt == "a photo of <a> and <b> and <c> red ball"


def test_reweighted_sampler():
    sampler = ConceptSampler([A, B], "reweighted", template="{} on white")
    sampler.update({0: 0.2, 1: 0.6})
    seen = collections.Counter(sampler.next().concepts for _ in range(9000))
    assert seen[(0,)] / seen[(1,)] == pytest.approx(3, rel=0.15)
    assert (seen[(0, 1)] + seen[(1, 0)]) / 9000 == pytest.approx(1 / 3, abs=0.02)
    assert sampler.name([1]).prompt == "<b> on white"
    # goes on from its state, through JSON
    state = json.loads(json.dumps(sampler.state_dict()))
    wanted = [sampler.next() for _ in range(50)]
    again = ConceptSampler([A, B], "reweighted", template="{} on white", seed=9)
    again.load_state_dict(state)
    assert [again.next() for _ in range(50)] == wanted
    with pytest.raises(ValueError, match="token of its own"):
        ConceptSampler([A, A])
    with pytest.raises(ValueError, match="mode='all'"):
        ConceptSampler([A], "all")


def test_denoising_loss_is_the_published_one():
    draw = torch.Generator().manual_seed(0)
    pred, target = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 4, 8, 8, generator=draw)
    mask = (torch.rand(8, 8, generator=draw) > 0.5).float()
    valid = torch.zeros(1, 1, 8, 8)
    valid[..., 1:-1, 1:-1] = 1
    # The published code multiplies one prediction by the mask and, by broadcasting, by the ones of the prior picture.
    two = torch.stack([mask, torch.ones(8, 8)])[:, None]
    released = (((pred * two - target * two) ** 2 * valid).sum((1, 2, 3)) / valid.sum((1, 2, 3))).mean()
    torch.testing.assert_close(masked_denoising_loss(pred, target, mask, 0.5), released)
    plain = ((pred - target) ** 2 * valid).sum() / valid.sum()
    torch.testing.assert_close(masked_denoising_loss(pred, target, mask, 1.0), plain)
    outside = target + (pred - target) * (1 - mask)
    assert masked_denoising_loss(outside, target, mask, 0.0) == 0
    assert masked_denoising_loss(pred, target, mask, 0.0) > 0
    everywhere = torch.ones(1, 1, 8, 8)
    full = masked_denoising_loss(pred, target, mask, 1.0, valid=everywhere)
    torch.testing.assert_close(full, 4 * torch.nn.functional.mse_loss(pred, target))
    with pytest.raises(ValueError, match="from 0 to 1"):
        masked_denoising_loss(pred, target, mask, 2.0)
    with pytest.raises(ValueError, match="do not fit"):
        masked_denoising_loss(pred, target, mask[:4])


def test_settings():
    config = AttenCraftConfig(train=["k"], mask_time=(0.1, 0.2), template="{} here")
    assert AttenCraftConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    wrong = {"steps": 0, "attention_weight": -1, "background_weight": 2, "learning_rate": 0, "mask_time": (0.4, 0.2),
             "cross_share": 0, "template": "a photo", "train": ()}  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            AttenCraftConfig(**{name: value})
    for bad in ({"token": "a b", "init_word": "cat"}, {"token": "<a>", "init_word": " "}):
        with pytest.raises(ValueError, match="use"):
            Concept(**bad)
