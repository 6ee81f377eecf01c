import itertools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from eff_kernels import native, neighborhood_attention
from eff_kernels.ops.neighborhood_attention import api, autograd, cpu, neighborhood_mask, reference, window_bounds
from eff_kernels.ops.neighborhood_attention.specs import SPECS
from eff_kernels.testing.aot import assert_compiles
from eff_kernels.testing.budget import assert_within_budget
from eff_kernels.testing.op_tests import OpTests
from hypothesis import given, settings
from hypothesis import strategies as st


def complete(q, k, v, window, stride=1, dilation=1, causal=False, scale=None, more_k=None, more_v=None):
    """The arguments of the op's schema."""
    rank = q.dim() - 3
    lists = [
        api.each_axis("x", x, rank, kind)
        for x, kind in zip((window, stride, dilation, causal), (int, int, int, bool), strict=True)
    ]
    if more_k is None:
        more_k, more_v = (t.new_empty(t.size(0), 0, *t.shape[-2:]) for t in (k, v))
    return q, k, v, *lists, q.size(-1) ** -0.5 if scale is None else scale, more_k, more_v


class TestNeighborhoodAttention(OpTests):
    function = staticmethod(neighborhood_attention)
    reference = staticmethod(reference.neighborhood_attention)
    op = api.OP
    specs = SPECS
    differentiable = ("query", "key", "value", "additional_keys", "additional_values")

    def schema_args(self, spec, args):
        return complete(*args)


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    return request.param


def windows(length, *settings):
    first, last = window_bounds(length, *settings)
    step = settings[2] if len(settings) > 2 else 1
    return [list(range(a, b + 1, step)) for a, b in zip(first.tolist(), last.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ((3,), {0: "0-2", 1: "0-2", 4: "3-5", 5: "4-6", 8: "7-9", 9: "7-9"}),
        ((4,), {0: "0-3", 1: "0-3", 4: "2-5", 5: "3-6", 8: "6-9", 9: "6-9"}),
        ((3, 1, 2), {0: "0,2,4", 1: "1,3,5", 4: "2,4,6", 5: "3,5,7", 8: "4,6,8", 9: "5,7,9"}),
        ((3, 1, 3), {4: "1,4,7"}),
        ((4, 2), {4: "3-6", 5: "3-6"}),
        ((4, 4), {8: "6-9", 9: "6-9"}),
        ((4, 1, 1, True), {4: "1-4", 0: "0-0"}),
        ((4, 2, 1, True), {4: "2-4", 5: "2-5"}),
    ],
)
def test_windows_of_ten_positions(settings, wanted):
    found = windows(10, *settings)
    for query, text in wanted.items():
        first, dash, last = text.partition("-")
        keys = list(range(int(first), int(last) + 1)) if dash else [int(x) for x in text.split(",")]
        assert found[query] == keys


def brute_force(q, k, v, window, stride, dilation, causal, scale, more_k, more_v):
    """Query by query in float64, from the definition of the window and without the reference's code."""
    shape = q.shape[1:-2]
    out = torch.empty(*q.shape[:-1], v.size(-1), dtype=torch.float64)
    lse = torch.empty(q.shape[:-1], dtype=torch.float64)

    def keys(axis, i):
        n, s, d = window[axis], stride[axis], dilation[axis]
        mine = [j for j in range(shape[axis]) if j % d == i % d]
        p = mine.index(i)
        if causal[axis]:
            leader = min(p // s * s + s - 1, len(mine) - 1)
            return mine[max(leader - n + 1, 0) : p + 1]
        leader = min(p // s * s + s // 2, len(mine) - 1)
        first = min(max(leader - n // 2, 0), len(mine) - n)
        return mine[first : first + n]

    group = q.size(-2) // k.size(-2)
    for b, *i, h in itertools.product(*(range(n) for n in q.shape[:-1])):
        seen = list(itertools.product(*(keys(axis, x) for axis, x in enumerate(i))))
        rows_k = torch.stack([k[(b, *j, h // group)] for j in seen] + list(more_k[b, :, h // group])).double()
        rows_v = torch.stack([v[(b, *j, h // group)] for j in seen] + list(more_v[b, :, h // group])).double()
        scores = rows_k @ q[(b, *i, h)].double() * scale
        lse[(b, *i, h)] = scores.logsumexp(0)
        out[(b, *i, h)] = scores.softmax(0) @ rows_v
    return out, lse


@dataclass(frozen=True)
class Call:
    """A random call; it prints as its settings and not as its tensors."""

    windows: tuple
    heads: tuple[int, int]
    features: tuple[int, int]
    extra: int
    seed: int

    def args(self):
        (shape, *windows), (group, heads), (d, dv) = zip(*self.windows, strict=True), self.heads, self.features
        generator = torch.Generator().manual_seed(self.seed)
        sizes = [(*shape, n, c) for n, c in ((group * heads, d), (heads, d), (heads, dv))]
        sizes += [(self.extra, heads, d), (self.extra, heads, dv)]
        q, k, v, *more = (torch.randn(1, *size, generator=generator) for size in sizes)
        return complete(q, k, v, *windows, None, *more)


@st.composite
def calls(draw):
    rank, axes = draw(st.integers(1, 3)), []
    for _ in range(rank):
        window = draw(st.integers(2, (9, 4, 3)[rank - 1]))
        dilation = draw(st.integers(1, (4, 2, 2)[rank - 1]))
        length = window * dilation + draw(st.integers(0, (30, 4, 1)[rank - 1]))
        axes.append((length, window, draw(st.integers(1, window)), dilation, draw(st.booleans())))
    heads = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 1), (2, 2)]))
    features = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    return Call(tuple(axes), heads, features, draw(st.integers(0, 3)), draw(st.integers(0, 999)))


@settings(max_examples=25, deadline=None)
@given(calls())
def test_reference_is_the_definition(call):
    args = call.args()
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    torch.testing.assert_close(reference.neighborhood_attention(*wide), brute_force(*args), rtol=1e-10, atol=1e-10)


@settings(max_examples=150, deadline=None)
@given(calls())
def test_compiled_code_on_any_call(call):
    """A few dozen roundings of float32 pass; the budgets are for the named specs, where values are many."""
    args = call.args()
    generator = torch.Generator().manual_seed(call.seed)

    def wide(tree):
        return [a.double() if isinstance(a, torch.Tensor) else a for a in tree]

    out, lse = api.OP(*args, backend="cpu")
    near = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close((out, lse), reference.neighborhood_attention(*wide(args)), **near)
    grads = [torch.randn(t.shape, generator=generator) for t in (out, lse)]
    backward = (*grads, *args[:3], out, lse, *args[3:])
    actual = autograd.BACKWARD_OP(*backward, backend="cpu")
    torch.testing.assert_close(actual, reference.neighborhood_attention_backward(*wide(backward)), **near)


@pytest.mark.parametrize("define", ["EFF_NO_AVX512", "EFF_GENERIC"])
@pytest.mark.parametrize("spec", [s for s in SPECS if "empty" not in s.tags], ids=lambda s: s.name)
def test_code_for_other_processors(define, spec, monkeypatch):
    if native.unavailable():
        pytest.skip(native.unavailable())
    monkeypatch.setattr(cpu.native, "library", lambda build=native.library: build(define))
    cpu._kernel.cache_clear()
    try:
        args = complete(*spec.args(torch.float32))
        out, lse = cpu.neighborhood_attention(*args)
        assert_within_budget((out, lse), reference.neighborhood_attention, args)
        backward = (torch.randn_like(out), torch.randn_like(lse), *args[:3], out, lse, *args[3:])
        actual = cpu.neighborhood_attention_backward(*backward)
        assert_within_budget(actual, reference.neighborhood_attention_backward, backward)
    finally:
        cpu._kernel.cache_clear()


@pytest.mark.parametrize("spec", [s for s in SPECS if "empty" not in s.tags], ids=lambda s: s.name)
def test_reference_backward_is_the_derivative(spec):
    args = complete(*spec.args(torch.float64))
    leaves = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    out, lse = reference.neighborhood_attention(*leaves)
    grads = torch.randn_like(out), torch.randn_like(lse)
    tensors = [a for a in leaves if isinstance(a, torch.Tensor)]
    wanted = torch.autograd.grad((out, lse), tensors, grads)
    actual = reference.neighborhood_attention_backward(*grads, *args[:3], out.detach(), lse.detach(), *args[3:])
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


def sdpa(q, k, v, **options):
    q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


@pytest.mark.parametrize("shape", [(20,), (5, 6), (3, 4, 5)])
def test_window_over_everything_is_plain_attention(shape, backend):
    q, k, v = torch.randn(3, 2, *shape, 2, 16)
    out, _ = neighborhood_attention(q, k, v, shape, backend=backend)
    torch.testing.assert_close(out.flatten(1, -3), sdpa(q, k, v), rtol=1e-5, atol=1e-6)


def test_causal_window_over_everything_is_causal_attention(backend):
    q, k, v = torch.randn(3, 2, 150, 2, 16)
    out, _ = neighborhood_attention(q, k, v, 150, is_causal=True, backend=backend)
    torch.testing.assert_close(out, sdpa(q, k, v, is_causal=True), rtol=1e-5, atol=1e-6)


def test_causal_window_is_a_sliding_window(backend):
    q, k, v = torch.randn(3, 1, 90, 2, 16)
    i = torch.arange(90)
    band = (i[:, None] >= i) & (i[:, None] - i < 12)
    out, _ = neighborhood_attention(q, k, v, 12, is_causal=True, backend=backend)
    torch.testing.assert_close(out, sdpa(q, k, v, attn_mask=band), rtol=1e-5, atol=1e-6)


def test_stride_of_the_window_is_attention_in_blocks(backend):
    q, k, v = torch.randn(3, 1, 8, 12, 2, 16)
    out, _ = neighborhood_attention(q, k, v, (4, 3), (4, 3), backend=backend)
    for i, j in itertools.product(range(0, 8, 4), range(0, 12, 3)):
        block = [t[:, i : i + 4, j : j + 3] for t in (q, k, v)]
        torch.testing.assert_close(out[:, i : i + 4, j : j + 3].flatten(1, 2), sdpa(*block), rtol=1e-5, atol=1e-6)


def test_dilation_is_attention_in_interleaved_sequences(backend):
    q, k, v = torch.randn(3, 1, 25, 2, 16)
    out, lse = neighborhood_attention(q, k, v, 5, 2, 3, backend=backend)
    for g in range(3):
        part = neighborhood_attention(*(t[:, g::3].contiguous() for t in (q, k, v)), 5, 2, backend=backend)
        torch.testing.assert_close((out[:, g::3], lse[:, g::3]), tuple(part), rtol=1e-5, atol=1e-6)


def test_axes_may_change_places(backend):
    q, k, v = torch.randn(3, 1, 9, 12, 2, 16)
    settings = ((3, 4), (2, 3), (1, 2), (True, False))
    out, _ = neighborhood_attention(q, k, v, *settings, backend=backend)
    swapped, _ = neighborhood_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), *(s[::-1] for s in settings), backend=backend
    )
    torch.testing.assert_close(swapped.transpose(1, 2), out, rtol=1e-5, atol=1e-6)


def test_a_value_changes_the_outputs_that_see_it_and_no_other(backend):
    settings = ((3, 5), (1, 1), (2, 1), (False, False))
    mask = neighborhood_mask((9, 11), *settings)
    q, k, v = torch.randn(3, 1, 9, 11, 1, 8)
    out, _ = neighborhood_attention(q, k, v, *settings, backend=backend)
    for j in (0, 16, 49, 98):
        changed = v.clone()
        changed.view(99, 8)[j] += 1
        other, _ = neighborhood_attention(q, k, changed, *settings, backend=backend)
        assert torch.equal((other != out).view(99, 8).any(1), mask[:, j])


def test_results_over_parts_of_the_keys_can_be_joined(backend):
    q, k, v = torch.randn(3, 1, 30, 2, 16)
    more_k, more_v = torch.randn(2, 1, 4, 2, 16)
    near = neighborhood_attention(q, k, v, 5, backend=backend)
    scores = torch.einsum("bnhd,bmhd->bnhm", q, more_k) / 4
    far, far_lse = torch.einsum("bnhm,bmhd->bnhd", scores.softmax(-1), more_v), scores.logsumexp(-1)
    whole = neighborhood_attention(q, k, v, 5, 1, 1, False, None, more_k, more_v, backend=backend)
    joined = near.output - torch.sigmoid(far_lse - near.lse)[..., None] * (near.output - far)
    torch.testing.assert_close(whole.output, joined, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.lse, torch.logaddexp(near.lse, far_lse), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e3, -1e3])
def test_large_scores_do_not_overflow(size, backend):
    q, k = torch.full((1, 300, 1, 8), size), torch.linspace(-1, 1, 300)[None, :, None, None].expand(1, 300, 1, 8)
    v = torch.randn(1, 300, 1, 8)
    out, _ = neighborhood_attention(q, k, v, 200, backend=backend)
    first, last = window_bounds(300, 200)
    torch.testing.assert_close(out, v[:, last if size > 0 else first])


def test_nan_stays_with_the_queries_that_see_its_key(backend):
    q, k, v = torch.randn(3, 1, 40, 1, 8)
    k[0, 20, 0, 3] = math.nan
    out, _ = neighborhood_attention(q, k, v, 5, backend=backend)
    assert out.isnan().any((0, 2, 3)).nonzero().flatten().tolist() == [18, 19, 20, 21, 22]


def test_threads_and_batch_do_not_change_the_bits():
    shapes = [(1, 200, 1, 16), (1, 4, 90, 1, 8), (3, 12, 12, 2, 16)]
    for shape in shapes:
        tensors = [torch.randn(shape, requires_grad=True) for _ in range(3)]

        def run(tensors):
            out, lse = neighborhood_attention(*tensors, 4)
            return out, lse, *torch.autograd.grad((out.square().sum(), lse.sum()), tensors)

        one = run(tensors)
        torch.set_num_threads(2)
        try:
            assert all(torch.equal(a, b) for a, b in zip(run(tensors), one, strict=True))
        finally:
            torch.set_num_threads(1)
        if shape[0] > 1:
            alone = neighborhood_attention(*(t[:1] for t in tensors), 4)
            assert torch.equal(alone.output, one[0][:1])


def test_frozen_tensors_get_no_gradient(backend):
    q, k, v = torch.randn(3, 1, 20, 2, 16)
    q.requires_grad_()
    neighborhood_attention(q, k, v, 5, backend=backend).output.sum().backward()
    assert k.grad is None
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    wanted = torch.autograd.grad(neighborhood_attention(*leaves, 5, backend=backend).output.sum(), leaves)
    torch.testing.assert_close(q.grad, wanted[0])


Q = torch.zeros(1, 6, 8, 4, 16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kernel_size": (3, 1)}, ValueError, "at least 2, got 1 on axis 1"),
        ({"kernel_size": 7}, ValueError, r"7 \* 1 must be at most the length of the axis, 6, on axis 0"),
        ({"kernel_size": 3, "dilation": (1, 3)}, ValueError, r"3 \* 3 .* 8, on axis 1"),
        ({"kernel_size": 3, "dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
        ({"kernel_size": 3, "stride": (1, 4)}, ValueError, "from 1 to kernel_size = 3, got 4 on axis 1"),
        ({"kernel_size": (3, 3, 3)}, ValueError, r"each of the 2 axes, got \(3, 3, 3\)"),
        ({"kernel_size": 3.0}, ValueError, "one int, .* got 3.0"),
        ({"kernel_size": 3, "is_causal": 1}, ValueError, "one bool, .* got 1"),
        ({"key": Q[..., :3, :], "value": Q[..., :3, :]}, ValueError, "4, must be a multiple of the key heads, 3"),
        ({"key": Q[:, :5]}, ValueError, r"\[1, 5, 8, 4, 16\]"),
        ({"value": Q.half()}, TypeError, "float16"),
        ({"query": Q[0, 0]}, ValueError, r"\[8, 4, 16\]"),
        ({"value": Q.to_sparse()}, TypeError, "sparse"),
        ({"additional_keys": Q[:, 0]}, ValueError, "given together"),
        (
            {"additional_keys": Q[:, 0, :, :3], "additional_values": Q[:, 0]},
            ValueError,
            r"\[1, M, 4, 16\].* got \[1, 8, 3, 16\]",
        ),
    ],
)
def test_errors_name_what_they_saw(change, error, message):
    with pytest.raises(error, match=message):
        neighborhood_attention(**{"query": Q, "key": Q, "value": Q, "kernel_size": 3, **change})


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("module", ["triton", "triton_backward"])
def test_triton_kernels_compile_for_each_gpu(module):
    assert_compiles(f"eff_kernels.ops.neighborhood_attention.{module}")


def test_triton_refuses_long_heads_with_the_limit():
    reason = api.OP.explain(*complete(*[torch.zeros(1, 4, 1, 200)] * 3, 2)).reasons["triton"]
    assert reason
    assert "128, got 200" in reason or "needs a CUDA" in reason
