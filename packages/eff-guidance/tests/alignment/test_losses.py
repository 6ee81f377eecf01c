"""The losses against explicit formulas in float64, worked examples and invariances."""

import math

import pytest
import torch
from eff_guidance.alignment import (
    attention_alignment_loss,
    feature_alignment_loss,
    resize_attention,
    resize_tokens,
)
from torch.utils._python_dispatch import TorchDispatchMode


def maps(seed=0, heads=3, tokens=9, width=4, kv=None, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads, tokens, width, generator=draw, dtype=dtype)
    k = torch.randn(2, kv or heads, tokens, width, generator=draw, dtype=dtype)
    return q, k


def reference(q_s, k_s, q_t, k_t, heads):
    z_s = (q_s[:, :heads] @ k_s[:, :heads].mT) / q_s.shape[-1] ** 0.5
    z_t = (q_t[:, :heads] @ k_t[:, :heads].mT) / q_t.shape[-1] ** 0.5
    return -(z_t.softmax(-1) * z_s.log_softmax(-1)).sum(-1).mean()


def entropy(q, k):
    z = (q @ k.mT) / q.shape[-1] ** 0.5
    return -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()


@pytest.mark.parametrize("chunk", [1, 7, 40, 100, 10_000])
def test_chunks_equal_the_explicit_loss_and_its_gradients(chunk):
    (q, k), (qt, kt) = maps(0, heads=4), maps(1, heads=3, width=6)
    q.requires_grad_()
    k.requires_grad_()
    wanted = reference(q, k, qt, kt, 2)
    found = attention_alignment_loss(q, k, qt, kt, heads=2, chunk=chunk)
    assert abs((found - wanted).item()) < 1e-12
    for a, b in zip(torch.autograd.grad(3 * found, (q, k)), torch.autograd.grad(3 * wanted, (q, k)), strict=True):
        assert float((a - b).abs().max()) < 1e-12
        assert not a[:, 2:].any()  # further heads are free


def test_gradcheck_with_grouped_keys_and_interpolation():
    (q, k), (qt, kt) = maps(0, heads=2, tokens=4, kv=1), maps(1, heads=2, tokens=9)
    q.requires_grad_()
    k.requires_grad_()
    for grids in ({}, {"interpolate": True}):
        target = (qt, kt) if grids else maps(2, heads=2, tokens=4)
        assert torch.autograd.gradcheck(
            lambda a, b, t=target, g=grids: attention_alignment_loss(a, b, *t, chunk=30, **g), (q, k)
        )
    (big, key), (small, small_key) = maps(3, heads=2, tokens=9, kv=1), maps(4, heads=2, tokens=4)
    big.requires_grad_()
    key.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: attention_alignment_loss(a, b, small, small_key, interpolate=True), (big, key)
    )


def test_worked_example():
    """Teacher logits (2, 0, 0, 0), student's zeros: cross-entropy ln 4; the teacher's entropy is .91828."""
    k_t = torch.tensor([[2.0], [0], [0], [0]]).expand(1, 1, 4, 1)
    q_t, zero = torch.ones(1, 1, 4, 1), torch.zeros(1, 1, 4, 1)
    found = attention_alignment_loss(zero, zero, q_t, k_t, scale_t=1.0)
    assert found.item() == pytest.approx(math.log(4), abs=1e-6)
    same = attention_alignment_loss(q_t, k_t, q_t, k_t, scale_s=1.0, scale_t=1.0)
    assert float(same) == pytest.approx(0.91828, abs=1e-5)


def test_least_value_is_the_entropy_of_the_teacher():
    qt, kt = maps(1)
    least = entropy(qt, kt)
    # A constant vector added to all keys adds a constant to each row of logits.
    shifted = attention_alignment_loss(qt, kt + torch.randn(4, dtype=torch.float64), qt, kt)
    assert (shifted - least).item() == pytest.approx(0, abs=1e-12)
    for seed in range(2, 12):
        assert attention_alignment_loss(*maps(seed), qt, kt) > least


def test_constants_on_rows_and_permuted_keys_change_nothing():
    (q, k), (qt, kt) = maps(0), maps(1)
    wanted = attention_alignment_loss(q, k, qt, kt)
    shift = torch.randn(1, 3, 1, 4, dtype=torch.float64)
    order = torch.randperm(9)
    for found in (
        attention_alignment_loss(q, k + shift, qt, kt),
        attention_alignment_loss(q, k, qt, kt + shift),
        attention_alignment_loss(q, k[:, :, order], qt, kt[:, :, order]),
    ):
        assert (found - wanted).item() == pytest.approx(0, abs=1e-12)
    assert abs((attention_alignment_loss(q, k[:, :, order], qt, kt) - wanted).item()) > 1e-3


def test_half_precision_with_huge_logits_is_computed_in_float32():
    """Logits of 4e5 overflow fp16 and their softmax underflows bf16; the loss and its gradient stay finite."""
    for dtype in (torch.float16, torch.bfloat16):
        (q, k), (qt, kt) = ((x.to(dtype) * 300 for x in maps(s)) for s in (0, 1))
        q.requires_grad_()
        found = attention_alignment_loss(q, k, qt, kt)
        wanted = reference(*(x.double() for x in (q, k, qt, kt)), 3)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
        found.backward()
        assert q.grad.dtype == dtype
        assert q.grad.isfinite().all()
        with torch.autocast("cpu", dtype):
            assert torch.equal(attention_alignment_loss(q, k, qt, kt), found)


class Sizes(TorchDispatchMode):
    """Largest tensor that comes out of any operation."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_no_whole_map_is_in_memory():
    (q, k), (qt, kt) = maps(0, tokens=64), maps(1, tokens=64)
    q.requires_grad_()
    with Sizes() as sizes:
        attention_alignment_loss(q, k, qt, kt, chunk=512).backward()
    assert 512 <= sizes.largest <= q.numel()  # 1536, where one head's map has 4096
    assert q.grad.abs().sum() > 0


def test_cosine_is_in_range_and_knows_no_scale():
    draw = torch.Generator().manual_seed(0)
    h, y = torch.randn(2, 2, 9, 5, generator=draw)
    found = feature_alignment_loss(h, y)
    assert -1 <= found.item() <= 1
    assert float(feature_alignment_loss(7 * h, 0.1 * y)) == pytest.approx(found.item(), abs=1e-6)
    assert float(feature_alignment_loss(h, 3 * h)) == pytest.approx(-1, abs=1e-6)
    assert float(feature_alignment_loss(h, -h)) == pytest.approx(1, abs=1e-6)
    wanted = -torch.stack(
        [torch.dot(a, b) / a.norm() / b.norm() for a, b in zip(h.view(-1, 5), y.view(-1, 5), strict=True)]
    )
    assert found.item() == pytest.approx(wanted.mean().item(), abs=1e-6)


def test_interpolation_keeps_constants_and_rows():
    """16 x 16 to 14 x 14 (appendix A.3)."""
    old, new = (16, 16), (14, 14)
    flat = torch.full((1, 256, 256), 1 / 256)
    found = resize_attention(flat, old, new)
    assert found.shape == (1, 196, 196)
    assert torch.allclose(found, torch.full_like(found, 1 / 196), atol=1e-7)
    weights = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert torch.allclose(resize_attention(weights, old, new).sum(-1), torch.ones(2, 196), atol=1e-6)
    tokens = torch.randn(2, 6, 5)
    wanted = torch.nn.functional.interpolate(tokens.mT.unflatten(2, (2, 3)), (4, 2), mode="bilinear").flatten(2).mT
    assert torch.allclose(resize_tokens(tokens, (2, 3), (4, 2)), wanted, atol=1e-6)


def test_interpolated_loss_equals_maps_resized_in_the_open():
    (q, k), (qt, kt) = maps(0, tokens=4), maps(1, tokens=9)
    found = attention_alignment_loss(q, k, qt, kt, interpolate=True, chunk=100)
    theirs = resize_attention(((qt @ kt.mT) / 2).softmax(-1), (3, 3), (2, 2))
    wanted = -(theirs * ((q @ k.mT) / 2).log_softmax(-1)).sum(-1).mean()
    assert (found - wanted).item() == pytest.approx(0, abs=1e-7)  # the resize matrix is float32
    # The other way round the student's logits are interpolated, over keys, then over queries.
    found = attention_alignment_loss(qt, kt, q, k, interpolate=True)
    z = torch.nn.functional.interpolate((qt @ kt.mT / 2).view(-1, 1, 3, 3), (2, 2), mode="bilinear").view(2, 3, 9, 4)
    z = torch.nn.functional.interpolate(z.mT.reshape(-1, 1, 3, 3), (2, 2), mode="bilinear").view(2, 3, 4, 4).mT
    wanted = -(((q @ k.mT) / 2).softmax(-1) * z.log_softmax(-1)).sum(-1).mean()
    assert (found - wanted).item() == pytest.approx(0, abs=1e-6)
    y = torch.randn(2, 9, 5)
    assert feature_alignment_loss(resize_tokens(y, (3, 3), (2, 2)), y, interpolate=True) == pytest.approx(-1, abs=1e-6)


def test_refusals():
    (q, k), (qt, kt) = maps(0), maps(1, heads=2)
    with pytest.raises(ValueError, match="heads=3; the teacher has 2 heads"):
        attention_alignment_loss(q, k, qt, kt)
    with pytest.raises(ValueError, match="heads=0; the student has 3"):
        attention_alignment_loss(q, k, qt, kt, heads=0)
    with pytest.raises(ValueError, match="9 tokens, the teacher 4; interpolate=True"):
        attention_alignment_loss(q, k, *maps(1, tokens=4))
    with pytest.raises(ValueError, match="do not form a square; give their grid as teacher_grid"):
        attention_alignment_loss(q, k, *maps(1, tokens=6), interpolate=True)
    with pytest.raises(ValueError, match=r"teacher grid \(2, 4\) has 8 places, but there are 6"):
        attention_alignment_loss(q, k, *maps(1, tokens=6), interpolate=True, teacher_grid=(2, 4))
    with pytest.raises(ValueError, match="q_t has shape"):
        attention_alignment_loss(q, k, qt[0], kt)
    with pytest.raises(ValueError, match="do not fit its keys"):
        attention_alignment_loss(q, k[:, :, :, :3], qt, kt)
    with pytest.raises(ValueError, match="chunk=0"):
        attention_alignment_loss(q, k, qt, kt, heads=2, chunk=0)
    with pytest.raises(ValueError, match="one B and C"):
        feature_alignment_loss(torch.zeros(2, 4, 3), torch.zeros(2, 4, 5))


def test_no_gradient_reaches_the_teacher():
    h, y = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    feature_alignment_loss(h, y).backward()
    assert y.grad is None
    assert h.grad.abs().sum() > 0
    student, teacher = ([t.requires_grad_() for t in maps(seed)] for seed in (0, 1))
    attention_alignment_loss(*student, *teacher).backward()
    assert all(t.grad is None for t in teacher)
    assert all(t.grad.abs().sum() > 0 for t in student)
