from typing import ClassVar

import pytest
import torch
from eff_kernels import native
from eff_kernels.ops.group_linear import GROUP, GroupWeight, api, cpu, group_linear, reference
from eff_kernels.ops.group_linear.specs import SPECS, weight_of
from eff_kernels.testing.op_tests import OpTests
from hypothesis import given, settings
from hypothesis import strategies as st

LAYOUTS = [(bits, minima, wide) for bits in (4, 8) for minima in (False, True) for wide in (False, True)]


def call(x, packed, bias, n, bits, offset, minima, wide, *, out_dtype=None, backend="auto"):
    return group_linear(
        x, GroupWeight(packed, n, bits, offset, minima, wide), bias, out_dtype=out_dtype, backend=backend
    )


class TestGroupLinear(OpTests):
    function = staticmethod(call)
    reference = staticmethod(reference.group_linear)
    op = api.OP
    specs = SPECS
    differentiable: ClassVar = ("x", "bias")
    gradcheck = False

    def schema_args(self, spec, args):
        return (*args, args[0].dtype)

    def expected_gradients(self, schema_args, cotangents):
        x, packed, bias, n, bits, offset, minima, wide, _ = schema_args
        weight = GroupWeight(packed, n, bits, offset, minima, wide).dequantize()
        found = []
        for to in (torch.float32, torch.float64):
            grads = [(cotangents[0].to(to) @ weight.to(to)).to(x.dtype if to == torch.float32 else to)]
            if bias is not None:
                grads.append(cotangents[0].to(to).sum(0).to(bias.dtype if to == torch.float32 else to))
            found.append(grads)
        return found[0], found[1]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_worked_example():
    """One group: x = 127 everywhere has codes 127; codes 10 - 8 with scale 0.5 are 1, and 32 of them 32 * 127."""
    codes = torch.full((1, 32), 10, dtype=torch.uint8)
    weight = GroupWeight.pack(codes, torch.tensor([[0.5]]), bits=4, offset=8)
    x = torch.full((1, 32), 127.0)
    assert group_linear(x, weight).tolist() == [[32 * 127.0]]
    low = GroupWeight.pack(codes, torch.tensor([[0.5]]), torch.tensor([[-2.0]]), bits=4)
    assert group_linear(x, low, torch.tensor([0.5])).tolist() == [[32 * 127 * 3 + 0.5]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("n", [1, 16, 37])
def test_packing_loses_nothing(layout, n):
    bits, minima, wide = layout
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 2**bits, (n, 96), generator=generator).to(torch.uint8)
    scale = draw(n, 3) if wide else draw(n, 3).half().float()
    minimum = scale.flip(1) if minima else None
    weight = GroupWeight.pack(codes, scale, minimum, bits=bits, offset=3)
    assert weight.wide == wide
    assert (weight.n, weight.k) == (n, 96)
    for got, given_ in zip(weight.unpack(), (codes, scale, minimum), strict=True):
        assert given_ is got is None or torch.equal(got, given_)
    whole = (codes.float() - 3) * scale.repeat_interleave(32, 1) + (
        0 if minimum is None else minimum.repeat_interleave(32, 1)
    )
    assert torch.equal(weight.dequantize(), whole)
    index = torch.tensor([[0, n - 1], [n // 2, 0]])
    assert torch.equal(weight.rows(index), whole[index])


def test_stacking():
    parts = [weight_of(n, 64, bits=4, minima=True, wide=False, seed=n) for n in (32, 16)]
    stacked = GroupWeight.stack(parts)
    assert torch.equal(stacked.dequantize(), torch.cat([p.dequantize() for p in parts]))
    assert GroupWeight.stack([weight_of(20, 64, bits=4, minima=True, wide=False), parts[0]]) is None
    assert GroupWeight.stack([parts[0], weight_of(16, 64, bits=4, minima=False, wide=False)]) is None


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 90),
    groups=st.integers(1, 5),
    layout=st.sampled_from(LAYOUTS),
    data=st.data(),
)
def test_a_row_has_the_same_bits_in_every_batch(m, n, groups, layout, data):
    bits, minima, wide = layout
    x, weight = draw(m, groups * GROUP), weight_of(n, groups * GROUP, bits=bits, minima=minima, wide=wide)
    whole = group_linear(x, weight, backend="cpu")
    first = data.draw(st.integers(0, m - 1))
    count = data.draw(st.integers(1, m - first))
    assert torch.equal(group_linear(x[first : first + count], weight, backend="cpu"), whole[first : first + count])


@pytest.mark.parametrize("minima", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_codes_are_exact(bits, minima):
    """All codes at their ends: no sum is cut short in 16 bits on the way."""
    codes = torch.full((17, 64), 2**bits - 1, dtype=torch.uint8)
    codes[5] = 0
    offset = 0 if minima else 2 ** (bits - 1)
    ones = torch.ones(17, 2)
    weight = GroupWeight.pack(codes, ones, ones * -1 if minima else None, bits=bits, offset=offset)
    x = torch.tensor([127.0, -127.0]).repeat_interleave(32)[None] * torch.tensor([[1.0], [0.5], [-1.0]])
    x[1, 32:] = 63.5
    exact = x.double() @ weight.dequantize().double().t()
    assert torch.equal(group_linear(x, weight, backend="cpu").double(), exact)
    assert exact.abs().max() > 1000


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_spoil_their_row_alone(bad):
    x, weight = draw(5, 64), weight_of(20, 64, bits=4, minima=True, wide=False)
    x[3, 40] = bad
    for backend in ("cpu", "reference"):
        y = group_linear(x, weight, backend=backend)
        assert y[3].isnan().all()
        assert y[[0, 1, 2, 4]].isfinite().all()


def test_gradient_of_a_bias_of_more_digits():
    """The sum over rows keeps the digits that the bias has, whatever the outputs have."""
    weight = GroupWeight.pack(torch.zeros(16, 32, dtype=torch.uint8), torch.ones(16, 1), bits=4, offset=8)
    bias, grad = torch.zeros(16, requires_grad=True), draw(300, 16).bfloat16()
    group_linear(draw(300, 32, seed=1).bfloat16(), weight, bias).backward(grad)
    torch.testing.assert_close(bias.grad, grad.double().sum(0).float(), rtol=1e-6, atol=1e-5)


def test_zeros_and_tiny_activations_give_the_bias():
    weight, bias = weight_of(20, 64, bits=8, minima=True, wide=False), draw(20)
    for value in (0.0, 1e-38, 1e-44):
        for backend in ("cpu", "reference"):
            assert torch.equal(group_linear(torch.full((2, 64), value), weight, bias, backend=backend)[1], bias)


@pytest.mark.parametrize("defines", [["EFF_NO_VNNI"], ["EFF_NO_VNNI", "EFF_GENERIC"]], ids=["avx2", "any processor"])
def test_code_for_other_processors(defines, monkeypatch):
    kernel = native.library(*defines).eff_group_linear
    kernel.argtypes, kernel.restype = cpu._kernel().argtypes, cpu._kernel().restype
    cases = [(m, layout) for m in (1, 7, 20) for layout in LAYOUTS]
    arguments = [(draw(m, 96, seed=m), weight_of(37, 96, bits=b, minima=low, wide=w)) for m, (b, low, w) in cases]
    wanted = [group_linear(x, weight, backend="cpu") for x, weight in arguments]
    monkeypatch.setattr(cpu, "_kernel", lambda: kernel)
    for (x, weight), y in zip(arguments, wanted, strict=True):
        got = group_linear(x, weight, backend="cpu")
        truth = group_linear(x.double(), weight, backend="reference")
        # The same integers; factors and sums of three groups in float32.
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))
        torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda w: group_linear(torch.ones(2, 32), w), ValueError, r"\[20, 64\] do not fit: got \[2, 32\]"),
        (lambda w: group_linear(torch.ones(2, 64).long(), w), TypeError, "int64"),
        (lambda w: group_linear(torch.ones(2, 64), w, torch.ones(3)), ValueError, r"\[20\], got \[3\]"),
        (lambda w: GroupWeight.pack(torch.zeros(2, 40, dtype=torch.uint8), torch.ones(2, 1), bits=4), ValueError, "32"),
        (lambda w: GroupWeight.pack(torch.zeros(2, 32), torch.ones(2, 1), bits=4), ValueError, "uint8"),
        (
            lambda w: GroupWeight.pack(torch.full((2, 32), 16, dtype=torch.uint8), torch.ones(2, 1), bits=4),
            ValueError,
            "15 or less, got 16",
        ),
        (
            lambda w: GroupWeight.pack(torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 2), bits=4),
            ValueError,
            r"scale must have shape \[2, 1\]",
        ),
        (
            lambda w: GroupWeight.pack(torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 1), bits=5),
            ValueError,
            "4 or 8, got 5",
        ),
    ],
)
def test_errors_name_what_they_saw(make, error, message):
    with pytest.raises(error, match=message):
        make(weight_of(20, 64, bits=4, minima=True, wide=False))
