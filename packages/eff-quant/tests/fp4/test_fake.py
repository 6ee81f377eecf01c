"""Fake quantisation and its gradient."""

import pytest
import torch
from eff_kernels import fp4_dequantize, fp4_quantize
from eff_quant import fake_fp4
from hypothesis import given
from hypothesis import strategies as st

FORMATS = ("nvfp4", "mxfp4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_it_is_a_round_trip(format, dtype):
    x = torch.randn(3, 5, 64, dtype=dtype)
    y = fake_fp4(x, format)
    assert y.dtype == dtype
    assert torch.equal(y, fp4_dequantize(fp4_quantize(x, format), format, dtype=dtype))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("clip_grad", [False, True])
def test_the_gradient_is_the_identity_also_for_zero_blocks(format, clip_grad):
    x = torch.randn(4, 64)
    x[1] = 0
    x[:, ::16] = 6.0  # no value is larger, so none is cut off
    x.requires_grad_()
    grad = torch.randn(4, 64)
    fake_fp4(x, format, clip_grad=clip_grad).backward(grad)
    assert torch.equal(x.grad, grad)


def test_clipping_stops_the_gradient_where_mxfp4_saturates():
    x = torch.full((1, 32), 1.0)
    x[0, 3], x[0, 7], x[0, 8], x[0, 9] = 7.5, -7.0, 6.9, 6.0  # the block's scale is 1, so 6 is the largest value
    x.requires_grad_()
    fake_fp4(x, "mxfp4", clip_grad=True).sum().backward()
    assert torch.nonzero(x.grad[0] == 0).flatten().tolist() == [3, 7]
    x.grad = None
    fake_fp4(x, "mxfp4", scale_rounding="ceil", clip_grad=True).sum().backward()
    assert (x.grad == 1).all()


def test_clipping_stops_the_gradient_beyond_a_static_scale():
    x = torch.linspace(-20, 20, 32).reshape(1, 32).requires_grad_()
    scale = torch.tensor(10 / 2688)  # calibrated on inputs up to 10
    fake_fp4(x, "nvfp4", global_scale=scale, clip_grad=True).sum().backward()
    assert torch.equal(x.grad == 1, x.abs() < 10 * 7 / 6)


def test_infinite_gradients_do_not_leak_through_a_clipped_value():
    x = torch.full((1, 32), 1.0)
    x[0, 3] = 7.5
    x.requires_grad_()
    grad = torch.ones(1, 32)
    grad[0, 3] = float("inf")
    fake_fp4(x, "mxfp4", clip_grad=True).backward(grad)
    assert x.grad[0, 3] == 0


@given(st.integers(0, 2**32 - 1), st.sampled_from(FORMATS), st.integers(-60, 60))
def test_powers_of_two_pass_through_and_rows_are_independent(seed, format, power):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
    y = fake_fp4(x, format)
    assert torch.equal(fake_fp4(x * 2.0**power, format), y * 2.0**power)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(fake_fp4(x[order], format), y[order])
    if format == "mxfp4":
        assert torch.equal(fake_fp4(y, format), y)


def test_nvfp4_is_closer_than_mxfp4_on_gaussian_data():
    x = 3 * torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = {f: (fake_fp4(x, f) - x).pow(2).mean().item() for f in FORMATS}
    assert errors["nvfp4"] == pytest.approx(0.081, rel=0.05)
    assert errors["mxfp4"] == pytest.approx(0.123, rel=0.05)


def test_it_compiles_into_one_graph():
    x = torch.randn(3, 64, requires_grad=True)
    compiled = torch.compile(lambda x: fake_fp4(x, "nvfp4", clip_grad=True), fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert torch.equal(y, fake_fp4(x, "nvfp4"))
    y.sum().backward()
    assert x.grad.abs().sum() > 0


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match="fp5"):
        fake_fp4(torch.randn(2, 32), "fp5")
    with pytest.raises(ValueError, match="even"):
        fake_fp4(torch.randn(2, 32), "nvfp4", scale_rounding="even")
    with pytest.raises(ValueError, match="multiple of 16"):
        fake_fp4(torch.randn(2, 40), "nvfp4")
