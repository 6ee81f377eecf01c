import pytest
import torch
from eff_kernels import taylor_linear_attention
from eff_kernels.op import triton_interprets
from eff_kernels.ops.taylor_linear_attention import api, chunks, reference
from eff_kernels.ops.taylor_linear_attention.specs import SPECS
from eff_kernels.testing.aot import assert_compiles
from eff_kernels.testing.op_tests import OpTests


class TestTaylorLinearAttention(OpTests):
    function = staticmethod(taylor_linear_attention)
    reference = staticmethod(reference.taylor_linear_attention)
    op = api.OP
    specs = SPECS
    differentiable = ("q", "k", "v")

    def schema_args(self, spec, args):
        q, k, v, mask = args
        options = spec.kwargs
        chunk = options.get("chunk_size") or chunks.pick_chunk(q.size(2), q.size(3), v.size(3))
        scale = options.get("scale", q.size(-1) ** -0.5)
        return q, k, v, mask, chunk, scale, None, options.get("return_state", False)

    def expected(self, schema_args):
        return tuple((r[0], r[2] if schema_args[-1] else None) for r in super().expected(schema_args))


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(t=45, d=6, e=5, heads=4, groups=2, dtype=torch.float64):
    return [draw(2, h, t, n, seed=i, dtype=dtype) for i, (h, n) in enumerate(((heads, d), (groups, d), (groups, e)))]


def test_two_tokens_by_hand():
    q, k = torch.tensor([[[[0.0], [1.0]]]]), torch.tensor([[[[3.0], [1.0]]]])
    v = torch.tensor([[[[8.0], [0.0]]]])
    # weights of the second query: 1 + 3 + 4.5 = 8.5 and 1 + 1 + 0.5 = 2.5
    assert taylor_linear_attention(q, k, v, scale=1.0).output.flatten().tolist() == pytest.approx([8.0, 8 * 8.5 / 11])


@pytest.mark.parametrize("chunk", [1, 7, 16, 45, 100])
def test_chunks_give_the_quadratic_form(chunk):
    q, k, v = inputs()
    score = (q @ k.repeat_interleave(2, 1).mT) * 6**-0.5
    weight = (1 + score + score**2 / 2).tril()
    wanted = weight / weight.sum(-1, keepdim=True) @ v.repeat_interleave(2, 1)
    found = taylor_linear_attention(q, k, v, chunk_size=chunk, backend="cpu").output
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_small_scores_give_softmax_attention():
    q, k, v = inputs(groups=4)
    q = q * 0.05 / (q @ k.mT).abs().max()
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    torch.testing.assert_close(taylor_linear_attention(q, k, v, scale=1.0).output, wanted, rtol=0, atol=1e-4)


def test_features_are_those_of_the_polynomial():
    x, y = draw(3, 5, seed=1), draw(4, 5, seed=2)
    product = x @ y.mT
    f = reference.features
    torch.testing.assert_close(f(x).mT @ f(y), 1 + product + product**2 / 2, rtol=1e-12, atol=1e-12)
    assert f(x).shape == (1 + 5 + 15, 3)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("sizes", [(45,), (1,) * 9 + (36,), (20, 25), (44, 1)])
def test_pieces_with_state_give_the_whole(backend, sizes):
    q, k, v = inputs(dtype=torch.float64 if backend != "triton" else torch.float32)
    mask = draw(2, 45, seed=9) > -0.5
    if backend == "triton" and (not triton_interprets() or sizes != (20, 25)):
        pytest.skip("tried with two pieces, under the interpreter")
    whole = taylor_linear_attention(q, k, v, mask, return_state=True, backend="reference")
    state, parts = None, []
    for a, b, c, m in zip(*(x.split(sizes, 2) for x in (q, k, v)), mask.split(sizes, 1), strict=True):
        before = None if state is None else state.clone()
        out, new = taylor_linear_attention(a, b, c, m, chunk_size=8, state=state, return_state=True, backend=backend)
        assert state is None or torch.equal(state, before)
        parts.append(out)
        state = new
    tolerance = 1e-12 if q.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(torch.cat(parts, 2), whole.output, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state, whole.state, rtol=tolerance, atol=tolerance * 10)
    assert state.shape == (2, 2, 1 + 6 + 21, 6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_with_a_state(backend):
    q, k, v = (x.requires_grad_() for x in inputs(t=9, d=3, e=2))
    state = taylor_linear_attention(*inputs(t=5, d=3, e=2), return_state=True).state
    mask = torch.arange(9).expand(2, 9) % 4 != 1

    def run(q, k, v):
        return taylor_linear_attention(q, k, v, mask, chunk_size=4, state=state, backend=backend).output

    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_query_without_keys_gives_zeros(backend):
    q, k, v = (x.requires_grad_() for x in inputs(t=6))
    mask = torch.tensor([[False, False, True, True, True, True], [False] * 6])
    out = taylor_linear_attention(q, k, v, mask, backend=backend).output
    assert (out[0, :, :2] == 0).all()
    assert (out[1] == 0).all()
    assert (out[0, :, 2:] != 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_the_choice_of_a_chunk():
    assert chunks.pick_chunk(2048, 64, 64) == 2048
    assert chunks.pick_chunk(8192, 64, 64) == 256
    assert chunks.pick_chunk(2048, 16, 16) == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"state": torch.zeros(2, 2, 3, 6)}, r"state must be \[2, 2, 28, 6\]"),
        ({"state": torch.zeros(2, 2, 28, 6, requires_grad=True)}, "detach it"),
        ({"key_mask": torch.ones(2, 3, dtype=torch.bool)}, r"key_mask must be bool \[2, 45\]"),
        ({"k": torch.zeros(2, 3, 45, 6), "v": torch.zeros(2, 3, 45, 5)}, "multiple of the key heads, 3"),
        ({"v": torch.zeros(2, 2, 44, 5)}, "do not fit"),
    ],
)
def test_errors(change, message):
    given = dict(zip("qkv", inputs(dtype=torch.float32), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        taylor_linear_attention(**given)


def test_one_dtype_is_wanted():
    q, k, v = inputs()
    with pytest.raises(TypeError, match="one float dtype"):
        taylor_linear_attention(q, k, v.float())


def test_kernels_compile_for_gpus_that_are_not_there():
    pytest.importorskip("triton")
    assert_compiles("eff_kernels.ops.taylor_linear_attention.triton")
