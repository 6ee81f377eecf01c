import math

import pytest
import torch
from eff_kernels.ops.rope import api, reference, rope
from eff_kernels.ops.rope.specs import SPECS
from eff_kernels.testing.aot import assert_compiles
from eff_kernels.testing.budget import assert_within_budget
from eff_kernels.testing.op_tests import OpTests
from hypothesis import given, settings
from hypothesis import strategies as st

BACKENDS = [b.name for b in api.OP.backends]


class TestRope(OpTests):
    function = staticmethod(rope)
    reference = staticmethod(reference.rope)
    op = api.OP
    specs = SPECS
    differentiable = ("x",)

    def schema_args(self, spec, args):
        return (*args, spec.kwargs.get("interleaved", False), False)


def tables(positions, features, base=10000.0):
    angle = positions[..., None] / base ** (torch.arange(0, features, 2) / features)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize(("interleaved", "wanted"), [(False, [-3.0, 2, 1, 4]), (True, [-2.0, 1, 3, 4])])
def test_worked_example(interleaved, wanted):
    # A quarter turn of the first pair takes (a, b) to (-b, a); the second pair stays.
    cos, sin = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]])
    x = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 1, 4)
    torch.testing.assert_close(rope(x, cos, sin, interleaved=interleaved).flatten(), torch.tensor(wanted))


def test_is_that_of_transformers():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = torch.randn(2, 4, 6, 32), torch.randn(2, 2, 6, 32)
    cos, sin = tables(torch.arange(6.0).expand(2, 6), 32)
    wanted = modeling.apply_rotary_pos_emb(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    torch.testing.assert_close((rope(q, cos, sin), rope(k, cos, sin)), wanted)


@pytest.mark.parametrize("interleaved", [False, True])
def test_is_a_product_of_complex_numbers(interleaved):
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    angle = torch.rand(2, 5, 6, dtype=torch.float64) * 10
    real, imaginary = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)[:, None]
    parts = (turned.real, turned.imag)
    wanted = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    torch.testing.assert_close(reference.rope(x, angle.cos(), angle.sin(), interleaved, False), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_inverse_takes_it_back(backend, interleaved):
    x = torch.randn(1, 2, 3, 16)
    cos, sin = tables(torch.arange(3.0)[None], 12)
    there = api.OP(x, cos, sin, interleaved, False, backend=backend)
    assert not torch.allclose(there, x)
    torch.testing.assert_close(api.OP(there, cos, sin, interleaved, True, backend=backend), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_depend_on_the_distance_alone(backend):
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)

    def score(m, n):
        at = [tables(torch.tensor([[float(p)]]), 64) for p in (m, n)]
        return (rope(q, *at[0], backend=backend) * rope(k, *at[1], backend=backend)).sum()

    torch.testing.assert_close(score(5, 2), score(105, 102), rtol=1e-4, atol=1e-4)  # angles above 100 are rounded
    assert abs(score(5, 2) - score(5, 4)) > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_length_of_each_pair_is_kept(backend):
    x = torch.randn(2, 2, 4, 32)
    y = rope(x, *tables(torch.arange(4.0)[None], 32), backend=backend)
    torch.testing.assert_close(torch.hypot(*y.chunk(2, -1)), torch.hypot(*x.chunk(2, -1)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_of_a_fused_projection(backend, interleaved):
    # [B, T, (H + 2 KV) * D] with queries and keys taken together, as the serving engine does.
    projection = torch.randn(2, 3, (4 + 2 + 2) * 16)
    heads = projection.view(2, 3, 8, 16)[:, :, :6].transpose(1, 2)
    cos, sin = tables(torch.arange(6.0).view(2, 3), 16)
    actual = rope(heads, cos, sin, interleaved=interleaved, backend=backend)
    assert actual.is_contiguous()
    assert_within_budget(actual, reference.rope, (heads, cos, sin, interleaved, False))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_tables(backend):
    x, (cos, sin) = torch.randn(2, 2, 3, 8), tables(torch.arange(6.0).view(2, 3), 8)
    both = torch.stack((cos, sin), -1)
    actual = rope(x, both[..., 0], both[..., 1], backend=backend)
    assert torch.equal(actual, rope(x, cos, sin, backend=backend))


def test_second_derivative():
    x = torch.randn(1, 1, 2, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = tables(torch.arange(2.0)[None], 4)
    assert torch.autograd.gradgradcheck(lambda t: api.OP(t, cos.double(), sin.double(), False, False), x)


def test_threads_do_not_change_the_bits():
    x, (cos, sin) = torch.randn(2, 9, 200, 64), tables(torch.arange(200.0)[None], 64)
    one = rope(x, cos, sin)
    torch.set_num_threads(2)
    try:
        assert torch.equal(rope(x, cos, sin), one)
    finally:
        torch.set_num_threads(1)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    pairs=st.integers(0, 70),
    kept=st.integers(0, 9),
    flags=st.tuples(st.booleans(), st.booleans()),
    shared=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(shape, pairs, kept, flags, shared, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, 2 * pairs + kept, generator=generator)
    angle = torch.rand(1 if shared else shape[0], shape[2], pairs, generator=generator) * 100
    args = (x, angle.cos(), angle.sin(), *flags)
    assert_within_budget(api.OP(*args), reference.rope, args)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(3, 4, 8)}, ValueError, r"\[batch, heads, tokens, features\], got \[3, 4, 8\]"),
        ({"cos": torch.zeros(1, 5, 4)}, ValueError, r"\[2 or 1, 4, at most 4\].*\[1, 5, 4\] and \[1, 4, 4\]"),
        ({"cos": torch.zeros(1, 5, 4), "sin": torch.zeros(1, 5, 4)}, ValueError, r"got \[1, 5, 4\]"),
        ({"cos": torch.zeros(1, 4, 5), "sin": torch.zeros(1, 4, 5)}, ValueError, "at most 4"),
        ({"cos": torch.zeros(3, 4, 4), "sin": torch.zeros(3, 4, 4)}, ValueError, r"\[2 or 1"),
        ({"cos": torch.zeros(4, 4), "sin": torch.zeros(4, 4)}, ValueError, r"got \[4, 4\]"),
        ({"cos": torch.zeros(1, 4, 4, dtype=torch.float16)}, TypeError, r"torch\.float16"),
        ({"x": torch.zeros(2, 3, 4, 8, dtype=torch.int32)}, TypeError, r"torch\.int32"),
        ({"sin": torch.zeros(1, 4, 4, requires_grad=True)}, ValueError, "no gradient to cos and sin"),
    ],
)
def test_wrong_arguments(change, error, text):
    args = {"x": torch.zeros(2, 3, 4, 8), "cos": torch.zeros(1, 4, 4), "sin": torch.zeros(1, 4, 4)} | change
    with pytest.raises(error, match=text):
        rope(**args)


def test_reference_gives_the_gradient_to_learned_angles():
    x = torch.randn(1, 1, 2, 4, dtype=torch.float64)
    angle = torch.tensor([[[0.3, 1.0], [2.0, math.pi]]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: reference.rope(x, a.cos(), a.sin(), False, False), angle)


@pytest.mark.timeout(600)
def test_triton_kernels_compile_for_each_gpu():
    assert_compiles("eff_kernels.ops.rope.triton")
