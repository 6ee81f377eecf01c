"""Quantising to groups of 32 columns."""

import pytest
import torch
from eff_serve.engine.groups import GroupConfig, GroupLinear, GroupRows, quantize_groups


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_eight_bits_keep_every_weight_within_half_a_step():
    weight = draw(40, 96)
    steps = weight.view(40, 3, 32).abs().amax(2) / 127
    error = (quantize_groups(weight, 8).dequantize() - weight).abs().view(40, 3, 32).amax(2)
    assert (error <= steps * 0.51 + weight.abs().max() * 2**-11).all()  # a scale is rounded to float16


def test_four_bits_err_less_than_the_whole_range_in_15_steps():
    weight = draw(64, 128) ** 3  # a few large ones in each group
    groups = weight.view(64, 4, 32)
    low, scale = groups.amin(2, keepdim=True), (groups.amax(2, keepdim=True) - groups.amin(2, keepdim=True)) / 15
    plain = ((groups - low) / scale).round() * scale + low
    ours = quantize_groups(weight, 4).dequantize().view_as(groups)
    assert (ours - groups).square().sum() < 0.9 * (plain - groups).square().sum()


@pytest.mark.parametrize("bits", [4, 8])
def test_constant_and_zero_groups_come_back(bits):
    weight = torch.zeros(2, 64)
    weight[1, 32:] = 0.5
    back = quantize_groups(weight, bits).dequantize()
    torch.testing.assert_close(back, weight, rtol=2e-3, atol=1e-6)


def test_layers_and_embeddings():
    weight, bias, x = draw(48, 64), draw(48), draw(5, 64, seed=1)
    layer = GroupLinear.quantize(weight, bias, GroupConfig(bits=8))
    y = x @ weight.t() + bias
    assert (layer(x) - y).norm() < 0.02 * y.norm()
    rows = GroupRows(layer.weight)
    assert torch.equal(rows[torch.tensor([3, 47])], layer.weight.dequantize()[[3, 47]])
    stacked = GroupLinear.stack([layer, GroupLinear.quantize(weight * 2, None, GroupConfig(bits=8))])
    assert torch.equal(stacked(x)[:, :48], layer(x))
    shuffled = GroupLinear(layer.weight, bias, order=torch.randperm(64))
    assert torch.equal(shuffled(x), layer(x[:, shuffled.order]))
    assert GroupLinear.stack([layer, shuffled]) is None


def test_inputs_that_are_no_whole_groups_are_refused():
    with pytest.raises(ValueError, match="groups of 32 columns do not divide the 40 inputs"):
        quantize_groups(draw(4, 40), 4)
