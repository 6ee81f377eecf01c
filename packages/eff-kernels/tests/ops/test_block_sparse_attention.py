from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from eff_kernels import block_sparse_attention, native
from eff_kernels.ops.block_sparse_attention import api, cpu, reference
from eff_kernels.ops.block_sparse_attention.specs import SPECS
from eff_kernels.testing.aot import assert_compiles
from eff_kernels.testing.budget import assert_within_budget
from eff_kernels.testing.op_tests import OpTests
from hypothesis import given, settings
from hypothesis import strategies as st


def complete(q, k, v, block_map, block_q=64, block_k=64, scale=None):
    return q, k, v, block_map, block_q, block_k, q.size(-1) ** -0.5 if scale is None else scale


class TestBlockSparseAttention(OpTests):
    function = staticmethod(block_sparse_attention)
    reference = staticmethod(reference.block_sparse_attention)
    op = api.OP
    specs = SPECS
    differentiable = ("q", "k", "v")
    may_refuse: ClassVar = {"triton": "takes blocks of"}

    def schema_args(self, spec, args):
        return complete(*args)


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    return request.param


def test_the_whole_map_is_dense_attention(backend):
    q, k, v = torch.randn(3, 2, 4, 90, 32).unbind()
    whole = torch.ones(2, 4, 3, 6, dtype=torch.int8)
    found = block_sparse_attention(q, k, v, whole, 32, 16, backend=backend)
    torch.testing.assert_close(found.output, F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=2e-6)


def test_a_query_without_keys_gives_zero_and_no_gradient(backend):
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 1, 32, 16).unbind())
    block_map = torch.tensor([[[[1, 0], [0, -1]]]], dtype=torch.int8)
    out, lse = block_sparse_attention(q, k, v, block_map, 16, 16, backend=backend)
    assert not out[:, :, 16:].any()
    assert (lse[:, :, 16:] == -torch.inf).all()
    (out.sum() + lse[:, :, :16].sum()).backward()
    for x, kept in ((q, 16), (k, 16), (v, 16)):
        assert x.grad[:, :, :kept].any()
        assert not x.grad[:, :, kept:].any()


def test_what_is_not_chosen_is_not_read(backend):
    q, k, v = torch.randn(3, 1, 2, 48, 16).unbind()
    block_map = torch.tensor([1, 0, -1], dtype=torch.int8).expand(1, 2, 3, 3)
    clean = block_sparse_attention(q, k, v, block_map, 16, 16, backend=backend)
    k[:, :, 16:], v[:, :, 16:] = float("nan"), float("inf")
    poisoned = block_sparse_attention(q, k, v, block_map, 16, 16, backend=backend)
    torch.testing.assert_close(poisoned, clean, rtol=1e-4, atol=1e-6)


def test_results_over_parts_join_through_the_lse(backend):
    q, k, v = torch.randn(3, 1, 2, 64, 16).unbind()
    one = (torch.rand(1, 2, 4, 4) < 0.5).to(torch.int8)
    parts = [block_sparse_attention(q, k, v, m, 16, 16, backend=backend) for m in (one, 1 - one)]
    share = torch.stack([p.lse for p in parts]).softmax(0)[..., None]
    joined = sum(p.output * s for p, s in zip(parts, share, strict=True))
    torch.testing.assert_close(joined, F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=2e-6)


def test_keys_may_be_permuted_block_by_block(backend):
    q, k, v = torch.randn(3, 1, 2, 64, 16).unbind()
    block_map = (torch.rand(1, 2, 4, 4) < 0.5).to(torch.int8)
    order = torch.randperm(4)
    moved = [x.unflatten(2, (4, 16))[:, :, order].flatten(2, 3) for x in (k, v)]
    found = block_sparse_attention(q, *moved, block_map[..., order], 16, 16, backend=backend).output
    wanted = block_sparse_attention(q, k, v, block_map, 16, 16, backend=backend).output
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


def test_the_written_backward_is_that_of_autograd():
    q, k, v = (torch.randn(1, h, 11, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    block_map = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]], dtype=torch.int8).expand(1, 4, 3, 3)
    args = (block_map, 4, 4, 0.3)
    out, lse = reference.block_sparse_attention(q, k, v, *args)
    keep = lse.isfinite()
    grads = torch.randn_like(out), torch.randn_like(lse) * keep
    wanted = torch.autograd.grad((out, lse.masked_fill(~keep, 0.0)), (q, k, v), grads)
    with torch.no_grad():
        found = reference.block_sparse_attention_backward(*grads, q, k, v, block_map, out, lse, *args[1:])
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*[st.integers(1, 70)] * 2),
    st.tuples(*[st.integers(1, 40)] * 2),
    st.tuples(*[st.integers(1, 40)] * 2),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_compiled_code_is_within_the_budget(lengths, blocks, features, heads, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (heads[0], lengths[0], features[0]),
        (heads[1], lengths[1], features[0]),
        (heads[1], lengths[1], features[1]),
    )
    q, k, v = (torch.randn(1, *s, generator=generator).to(dtype) for s in shapes)
    tiles = [-(-n // b) for n, b in zip(lengths, blocks, strict=True)]
    block_map = torch.randint(-1, 2, (1, heads[0], *tiles), generator=generator, dtype=torch.int8)
    args = complete(q, k, v, block_map, *blocks)
    found = cpu.block_sparse_attention(*args)
    assert_within_budget(found, reference.block_sparse_attention, args)
    out, lse = found
    grads = torch.randn(out.shape, generator=generator).to(dtype), torch.randn(lse.shape, generator=generator)
    back = (*grads, *args[:4], out, lse, *args[4:])
    found = cpu.block_sparse_attention_backward(*back)
    assert_within_budget(found, reference.block_sparse_attention_backward, back)


@pytest.mark.parametrize("define", ["EFF_GENERIC", "EFF_NO_AVX512"])
def test_code_for_other_processors(define, monkeypatch):
    args = complete(*SPECS[2].args(torch.float32))
    if native.unavailable():
        pytest.skip(native.unavailable())
    monkeypatch.setattr(cpu.native, "library", lambda build=native.library: build(define))
    cpu._kernel.cache_clear()
    try:
        found = cpu.block_sparse_attention(*args)
        assert_within_budget(found, reference.block_sparse_attention, args)
        back = (torch.randn_like(found[0]), torch.randn_like(found[1]), *args[:4], *found, *args[4:])
        assert_within_budget(
            cpu.block_sparse_attention_backward(*back), reference.block_sparse_attention_backward, back
        )
    finally:
        cpu._kernel.cache_clear()


def test_bits_do_not_depend_on_the_number_of_threads():
    args = complete(*SPECS[1].args(torch.float32))
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out = cpu.block_sparse_attention(*args)
        found.append((*out, *cpu.block_sparse_attention_backward(out[0], out[1], *args[:4], *out, *args[4:])))
    torch.set_num_threads(before)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_bad_input_is_named():
    q, k, v = torch.randn(3, 1, 2, 32, 16).unbind()
    block_map = torch.ones(1, 2, 2, 2, dtype=torch.int8)

    def call(q=q, k=k, v=v, block_map=block_map, block_q=16, block_k=16):
        return block_sparse_attention(q, k, v, block_map, block_q, block_k)

    for changes, error, text in (
        ({"q": q[0]}, ValueError, r"must be \[B, H, L, D\]"),
        ({"v": v[:, :, :20]}, ValueError, "do not fit"),
        ({"k": k[:, :0], "v": v[:, :0]}, ValueError, "multiple of the key heads, 0"),
        ({"k": k.double()}, TypeError, "one float dtype"),
        ({"block_q": 0}, ValueError, "block_q=0"),
        ({"block_map": block_map.bool()}, TypeError, "int8, got torch.bool"),
        ({"block_map": block_map[..., :1]}, ValueError, r"must be \[1, 2, 2, 2\] for these blocks"),
        ({"block_map": block_map.to("meta")}, ValueError, "one device"),
    ):
        with pytest.raises(error, match=text):
            call(**changes)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("module", ["triton", "triton_backward"])
def test_triton_kernels_compile_for_each_gpu(module):
    assert_compiles(f"eff_kernels.ops.block_sparse_attention.{module}")
