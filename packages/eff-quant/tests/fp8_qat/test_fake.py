"""Fake quantisation: values, gradients, invariances, and torchao's beside ours."""

import pytest
import torch
from eff_quant import FP8Spec, fake_quant_fp8

E4M3, E5M2 = FP8Spec(), FP8Spec(dtype="e5m2")
EVERY = [FP8Spec(dtype=d, granularity=g) for d in ("e4m3", "e5m2") for g in ("row", "tensor", "block", "mx32")]


def label(spec):
    return f"{spec.dtype}-{spec.granularity}{'-pow2' if spec.power_of_two else ''}"


@pytest.fixture(params=EVERY, ids=label)
def spec(request):
    return request.param


@pytest.mark.parametrize("spec", [E4M3, E5M2], ids=label)
def test_worked_row(spec):
    """The scales are 2**-6 and 2**-13; 0.3, 0.01 and 0.001 have the same neighbours in both formats."""
    y = fake_quant_fp8(torch.tensor([[1.0, -0.5, 0.3, 0.01, 0.001, 7.0]]), spec)
    assert y.tolist() == [[1.0, -0.5, 0.3125, 0.009765625, 0.0009765625, 7.0]]


def test_the_largest_entry_and_all_signs_are_kept(spec):
    x = torch.randn(40, 300) * torch.logspace(-3, 3, 40)[:, None]
    y = fake_quant_fp8(x, FP8Spec(dtype=spec.dtype))
    top = x.abs().argmax(1, keepdim=True)
    # x / (x / M) may miss M by a rounding, and M * (x / M) misses x by another
    torch.testing.assert_close(y.gather(1, top), x.gather(1, top), rtol=2**-22, atol=0)
    every = fake_quant_fp8(x, spec)
    assert torch.equal(torch.signbit(every), torch.signbit(x))


def test_the_largest_entry_is_exact_where_the_scale_is():
    x = torch.tensor([[448.0 * 2.0**-9, 0.1, -0.7]])
    assert fake_quant_fp8(x, E4M3)[0, 0] == x[0, 0]


@pytest.mark.parametrize("spec", [E4M3, E5M2], ids=label)
def test_no_entry_leaves_the_range_by_a_rounding(spec):
    """Of every float32, up to a power of two: x / (x / M) exceeds M for some, and is rounded to M for all."""
    x = (torch.arange(2**23, dtype=torch.int32) + 0x3F800000).view(torch.float32)
    most = torch.finfo(spec.torch_dtype).max
    quotient = x / (x / most)
    assert quotient.max() > most
    assert bool((quotient.to(spec.torch_dtype).float() == most).all())
    beyond = x[quotient > most][:1000, None].clone().requires_grad_()
    y = fake_quant_fp8(beyond, spec, scale_grad=True)
    torch.testing.assert_close(y, beyond, rtol=2**-22, atol=0)
    y.sum().backward()
    torch.testing.assert_close(beyond.grad, torch.ones_like(beyond), rtol=1e-6, atol=0)


def test_zero_rows_stay_zero_with_a_finite_gradient(spec):
    x = torch.zeros(4, 160, requires_grad=True)
    y = fake_quant_fp8(x, spec)
    assert not y.any()
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("granularity", ["row", "tensor", "block", "mx32"])
@pytest.mark.parametrize("weight", [False, True])
def test_rounding_twice_is_rounding_once_with_powers_of_two(granularity, weight):
    for dtype in ("e4m3", "e5m2"):
        spec = FP8Spec(dtype=dtype, granularity=granularity, power_of_two=True)
        x = torch.randn(150, 300)
        once = fake_quant_fp8(x, spec, weight=weight)
        assert torch.equal(fake_quant_fp8(once, spec, weight=weight), once)


def test_rounding_twice_is_rounding_once_on_gaussian_rows():
    x = torch.randn(2000, 256)
    once = fake_quant_fp8(x, E4M3)
    assert torch.equal(fake_quant_fp8(once, E4M3), once)


@pytest.mark.parametrize(
    ("spec", "eps", "least"), [(E4M3, 2**-4, 2.0**-6), (E5M2, 2**-3, 2.0**-14)], ids=["e4m3", "e5m2"]
)
def test_relative_error_of_normal_numbers(spec, eps, least):
    x = torch.randn(200, 256)
    scale = x.abs().amax(1, keepdim=True) / torch.finfo(spec.torch_dtype).max
    normal = x.abs() >= least * scale
    error = ((fake_quant_fp8(x, spec) - x).abs() / x.abs())[normal]
    assert normal.float().mean() > 0.9
    assert eps / 2 < error.max() <= eps * (1 + 2**-20)


def test_powers_of_two_scale_through(spec):
    x = torch.randn(140, 200)
    for c in (2.0**-9, 4.0):
        assert torch.equal(fake_quant_fp8(c * x, spec), c * fake_quant_fp8(x, spec))


def test_rows_are_independent_of_the_batch(spec):
    if spec.granularity == "tensor":
        pytest.skip("one scale for all rows, by definition")
    x = torch.randn(3, 10, 200)
    whole = fake_quant_fp8(x, spec)
    assert torch.equal(fake_quant_fp8(x[1:2, 4], spec), whole[1:2, 4])
    order = torch.randperm(10)
    assert torch.equal(fake_quant_fp8(x[:, order], spec), whole[:, order])


def test_blocks_have_scales_of_their_own():
    x = torch.ones(130, 260)
    x[0, 0], x[129, 259], x[:, 1] = 3e4, 5e4, 1e-3
    tiles = fake_quant_fp8(x, FP8Spec(granularity="block"), weight=True)
    assert tiles[5, 1] == 0  # in the tile of 3e4
    torch.testing.assert_close(tiles[129, 1].item(), 1e-3, rtol=2**-4, atol=0)
    rows = fake_quant_fp8(x, FP8Spec(granularity="block"))
    assert rows[0, 1] == 0
    assert rows[5, 1] != 0
    assert rows[0, 130] == 1
    small = fake_quant_fp8(x, FP8Spec(granularity="mx32"))
    assert small[0, 1] == 0
    assert small[1, 1] != 0


def test_mx32_has_powers_of_two_for_scales():
    assert FP8Spec(granularity="mx32").power_of_two
    x = torch.randn(1, 32)
    amax = x.abs().max()
    scale = 2.0 ** torch.ceil(torch.log2(amax / 448))
    assert torch.equal(
        fake_quant_fp8(x, FP8Spec(granularity="mx32")), (x / scale).to(torch.float8_e4m3fn).float() * scale
    )


def test_gradients_pass_bit_for_bit(spec):
    x, w = torch.randn(140, 300, requires_grad=True), torch.randn(140, 300)
    (fake_quant_fp8(x, spec, weight=True) * w).sum().backward()
    assert torch.equal(x.grad, w)


@pytest.mark.parametrize("dtype", ["e4m3", "e5m2"])
def test_gradient_with_the_scale_in_it(dtype):
    """d(round(x / s) s) = dx + (round(x / s) - x / s) ds, with ds = sign(x) / M at the largest entry."""
    spec = FP8Spec(dtype=dtype)
    x, w = torch.randn(20, 64, requires_grad=True), torch.randn(20, 64)
    (fake_quant_fp8(x, spec, scale_grad=True) * w).sum().backward()
    wide, most = x.detach().double(), torch.finfo(spec.torch_dtype).max
    scale = wide.abs().amax(1, keepdim=True) / most
    error = fake_quant_fp8(x.detach(), spec).double() / scale - wide / scale
    largest = wide.abs() == wide.abs().amax(1, keepdim=True)
    expected = w + largest * wide.sign() / most * (w * error).sum(1, keepdim=True)
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-5)
    assert ((x.grad - w).abs() > 1e-4).any()
    assert torch.equal(fake_quant_fp8(x, spec, scale_grad=True), fake_quant_fp8(x, spec))


def test_nothing_is_kept_for_the_backward():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fake_quant_fp8(torch.randn(4, 8, requires_grad=True), E4M3)
    assert kept == []


def test_what_is_no_float_is_returned_as_it_is():
    x = torch.arange(5)
    assert fake_quant_fp8(x, E4M3) is x


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_spoil_their_row_alone(bad):
    x = torch.ones(3, 8)
    x[1, 2] = bad
    y = fake_quant_fp8(x, E4M3)
    assert y[1].isnan().all()
    assert (y[[0, 2]] == 1).all()


@pytest.mark.parametrize("settings", [{"granularity": "column"}, {"dtype": "e3m4"}])
def test_unknown_settings_are_refused(settings):
    with pytest.raises(ValueError, match="use one of"):
        FP8Spec(**settings)


def test_scale_gradient_needs_scales_with_a_gradient():
    with pytest.raises(ValueError, match="powers of two"):
        fake_quant_fp8(torch.ones(2, 2), FP8Spec(power_of_two=True), scale_grad=True)
    with pytest.raises(ValueError, match=r"matrix.*\[2, 2, 2\]"):
        fake_quant_fp8(torch.ones(2, 2, 2), FP8Spec(granularity="block"), weight=True)


class TestBesideTorchAO:
    @pytest.fixture(params=["e4m3", "e5m2"])
    def pair(self, request):
        pytest.importorskip("torchao")
        from torchao.quantization.granularity import PerRow
        from torchao.quantization.qat import Float8FakeQuantizeConfig
        from torchao.quantization.qat.fake_quantizer import Float8FakeQuantizer

        spec = FP8Spec(dtype=request.param)
        theirs = Float8FakeQuantizer(Float8FakeQuantizeConfig(dtype=spec.torch_dtype, granularity=PerRow()))
        return spec, theirs

    def test_same_bits_in_float32(self, pair):
        spec, theirs = pair
        x = torch.randn(200, 256) * torch.logspace(-3, 3, 200)[:, None]
        assert torch.equal(fake_quant_fp8(x, spec), theirs(x))

    def test_same_bits_in_bfloat16_with_its_scale_in_float32(self, pair):
        spec, theirs = pair
        x = torch.randn(200, 256).bfloat16()
        ours = fake_quant_fp8(x, spec)
        assert torch.equal(ours, theirs(x.float()).bfloat16())
        assert not torch.equal(ours, theirs(x))  # its scale is rounded to bfloat16

    def test_its_gradient_is_rounded_to_fp8_and_ours_is_not(self, pair):
        """Its straight-through gradient passes through a tensor of FP8 in PyTorch 2.15 and is cast to it."""
        spec, theirs = pair
        x, w = torch.randn(20, 64, requires_grad=True), torch.randn(20, 64)
        (theirs(x) * w).sum().backward()
        scale = (x.abs().amax(1, keepdim=True) / torch.finfo(spec.torch_dtype).max).detach()
        rounded = (w * scale).to(spec.torch_dtype).float() / scale
        largest = x.abs() == x.abs().amax(1, keepdim=True)
        torch.testing.assert_close(x.grad[~largest], rounded[~largest], rtol=1e-5, atol=1e-6)
        assert ((x.grad - w).abs()[~largest] > 0.05).any()

    def test_its_zero_rows_are_nan_and_ours_zero(self, pair):
        spec, theirs = pair
        x = torch.zeros(2, 8)
        assert theirs(x).isnan().all()
        assert not fake_quant_fp8(x, spec).any()
