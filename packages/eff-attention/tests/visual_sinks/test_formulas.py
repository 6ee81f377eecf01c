import math

import pytest
import torch
from eff_attention.visual_sinks import (
    VARConfig,
    image_centric_heads,
    redistribute_attention,
    sink_mask,
    sink_values,
)
from hypothesis import given, settings
from hypothesis import strategies as st

# BOS and three picture tokens and a word; BOS and the first picture token are sinks
IMAGE = torch.tensor([[False, True, True, True, False]])
SINKS = torch.tensor([[True, True, False, False, False]])


def row(*weights):
    return torch.tensor(weights).view(1, 1, 1, -1)


ALL = torch.ones(1, 1, 1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("before", "p", "after"),
    [
        ((0.4, 0.2, 0.1, 0.1, 0.2), 0.6, (0.16, 0.08, 0.28, 0.28, 0.20)),
        ((0.4, 0.2, 0.1, 0.1, 0.2), 0.4, (0.24, 0.12, 0.22, 0.22, 0.20)),
        ((0.3, 0.3, 0.15, 0.05, 0.2), 0.6, (0.12, 0.12, 0.42, 0.14, 0.20)),
    ],
)
def test_by_hand(before, p, after):
    found = redistribute_attention(row(*before), IMAGE, SINKS, ALL, p)
    torch.testing.assert_close(found, row(*after), atol=1e-6, rtol=0)


def test_heads_by_hand():
    weights = row(0.4, 0.2, 0.1, 0.1, 0.2)  # half of the picture's share is not the sink's
    assert image_centric_heads(weights, IMAGE, SINKS, 0.5).all()
    assert not image_centric_heads(weights, IMAGE, SINKS, 0.8).any()
    assert image_centric_heads(weights, IMAGE, SINKS, 0.8, ratio="sink").all()  # at most 0.8 of it is
    assert not image_centric_heads(weights, IMAGE, SINKS, 0.4, ratio="sink").any()
    little = row(0.61, 0.01, 0.09, 0.09, 0.2)  # 0.19 of the picture
    assert not image_centric_heads(little, IMAGE, SINKS, 0.0).any()
    assert image_centric_heads(little, IMAGE, SINKS, 0.0, 0.18).all()


def test_without_a_receiver_nothing_moves():
    weights = row(0.4, 0.2, 0.1, 0.1, 0.2)
    every = SINKS | IMAGE
    assert not image_centric_heads(weights, IMAGE, every, 0.0).any()
    assert torch.equal(redistribute_attention(weights, IMAGE, every, ALL, 0.6), weights)
    none = row(0.8, 0.2, 0.0, 0.0, 0.0)
    assert torch.equal(redistribute_attention(none, IMAGE, SINKS, ALL, 0.6), none)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.floats(0, 1))
def test_rows_keep_their_sums(seed, dtype, p):
    g = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(2, 3, 5, 9, generator=g, dtype=torch.float64)
    hidden = torch.rand(2, 1, 5, 9, generator=g) < 0.3
    hidden[..., 0] = False
    weights = logits.masked_fill(hidden, -math.inf).softmax(-1).to(dtype)
    image, sinks = (torch.rand(2, 9, generator=g) < 0.5 for _ in range(2))
    select = torch.rand(2, 3, 5, generator=g) < 0.7
    found = redistribute_attention(weights, image, sinks, select, p)
    assert found.dtype == dtype
    limit = 2e-3 if dtype == torch.bfloat16 else 1e-6
    assert (found.double().sum(-1) - weights.double().sum(-1)).abs().max() <= (9 * 2**-9 if limit > 1e-4 else limit)
    assert (found >= 0).all()
    assert (found[hidden.expand_as(found)] == 0).all()
    assert torch.equal(found[~select], weights[~select])
    if dtype == torch.float64:  # ratios inside of the groups stay
        gain = found / weights.where(weights > 0, 1.0)
        text = ~image & ~sinks
        for b in range(2):
            torch.testing.assert_close(found[b][..., text[b]], weights[b][..., text[b]], atol=0, rtol=0)
            group = gain[b][..., image[b] & ~sinks[b]]
            seen = weights[b][..., image[b] & ~sinks[b]] > 0
            if group.shape[-1]:
                top = torch.where(seen, group, -1.0).amax(-1, keepdim=True)
                # Gains are large where the picture had next to nothing.
                assert ((group - top).abs() <= 1e-12 * top.clamp(min=1))[seen].all()


def test_gradients():
    weights = torch.randn(1, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    select = torch.ones(1, 2, 3, dtype=torch.bool)
    assert torch.autograd.gradcheck(
        lambda w: redistribute_attention(w, IMAGE, SINKS, select, 0.6), weights.requires_grad_()
    )


def test_values_of_sinks():
    x = torch.zeros(64)
    x[3], x[7] = 10.0, 1.0
    assert sink_values(x, [3]).item() == pytest.approx(7.960, abs=1e-3)
    wide = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sink_values(1000 * wide, [1, 5]), sink_values(wide, [1, 5]))
    assert (sink_values(wide, range(64)) <= 8).all()
    assert sink_values(x.half() * 6000, [3]).item() == pytest.approx(7.960, abs=1e-2)
    assert sink_mask(x, [3], 7.9).item()
    assert not sink_mask(x, [7], 7.9).item()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: VARConfig(rho=1.2), "rho=1.2; use 0 to 1"),
        (lambda: VARConfig(p=-0.1), "p=-0.1"),
        (lambda: VARConfig(min_image_mass=2), "min_image_mass"),
        (lambda: VARConfig(dims=()), "dims is empty"),
        (lambda: VARConfig(dims=(-1,)), "use 0 to"),
        (lambda: VARConfig(tau=0.0), "tau=0.0"),
        (lambda: VARConfig(tau=20.0).threshold(400), "can never fire"),
        (lambda: VARConfig().layers(3), "leave none of 3"),
        (lambda: VARConfig(first_layer=-1), "first_layer"),
        (lambda: sink_values(torch.ones(2, 4), [4]), r"dims=\(4,\)"),
        (lambda: redistribute_attention(row(0.5, 0.5), IMAGE, SINKS, ALL, 0.5), r"image_mask must be \[B, K\]"),
        (lambda: redistribute_attention(row(1.0), IMAGE, SINKS, ALL[0], 0.5), "select must be"),
        (lambda: redistribute_attention(row(1.0), IMAGE, SINKS, ALL, 1.5), "p=1.5"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_settings_travel():
    config = VARConfig(dims=(3, 5), tau="auto", rho=0.8)
    assert VARConfig.from_dict(config.to_dict()) == config
    assert config.threshold(4096) == pytest.approx(20.0, abs=0.04)
    assert list(VARConfig(skip_last_layer=False).layers(4)) == [2, 3]


def test_a_picture_with_next_to_no_weight_takes_none():
    """A share by a number below the range of float32 would be infinite, and not a number where it meets a 0."""
    weights = torch.tensor([[[[1.0, 1e-44, 0.0]]]])
    image, sinks = torch.tensor([[False, True, True]]), torch.tensor([[True, False, False]])
    select = torch.ones(1, 1, 1, dtype=torch.bool)
    assert torch.equal(redistribute_attention(weights, image, sinks, select), weights)
