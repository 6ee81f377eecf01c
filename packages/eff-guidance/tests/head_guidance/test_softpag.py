"""The maths of SoftPAG against explicit attention maps in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from eff_guidance.head_guidance import soft_perturb_attention
from eff_guidance.head_guidance.targets import TARGETS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

STREAMS = sorted(set(TARGETS) - {"identity", "uniform", "query_mean", "max"})


def draw(batch=2, heads=3, length=7, dim=4, seed=0, dtype=torch.float64, kv=None):
    gen = torch.Generator().manual_seed(seed)
    shape = (batch, kv or heads, length, dim)
    return (
        torch.randn(batch, heads, length, dim, generator=gen, dtype=dtype),
        torch.randn(shape, generator=gen, dtype=dtype),
        torch.randn(shape, generator=gen, dtype=dtype),
    )


def target_map(name, q, k, image, visible=None):
    """P as a matrix [B, H, N, N], straight from its definition."""
    n = q.shape[2]
    visible = torch.ones(n, n, dtype=torch.bool) if visible is None else visible
    logits = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~visible, -torch.inf)
    a = logits.softmax(-1)
    is_image = torch.zeros(n, dtype=torch.bool)
    is_image[image] = True
    if name == "identity":
        return torch.eye(n, dtype=q.dtype).expand_as(a)
    if name == "uniform":
        return (visible.to(q.dtype) / visible.sum(-1, keepdim=True)).expand_as(a)
    if name.startswith("query_mean"):
        rows = {"query_mean": is_image | True, "query_mean_image": is_image, "query_mean_text": ~is_image}[name]
        mean = q[:, :, rows].mean(2, keepdim=True).expand_as(q)
        moved = (mean @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~visible, -torch.inf).softmax(-1)
        return torch.where(rows[:, None], moved, a)
    if name == "max":
        return F.one_hot(a.argmax(-1), n).to(q.dtype)
    if name == "image_identity":
        hidden = is_image[:, None] & is_image[None] & ~torch.eye(n, dtype=torch.bool)
        return logits.masked_fill(hidden, -torch.inf).softmax(-1)
    if name == "image_renorm":
        moved = a.clone()
        moved[..., is_image] = 0
        moved = moved + torch.diag_embed(a[..., is_image].sum(-1))
        return torch.where(is_image[:, None], moved, a)
    rows, keys = ({"i": is_image, "t": ~is_image}[letter] for letter in name[:2])
    hidden = rows[:, None] & keys[None]
    if name.endswith("zero"):
        return a.masked_fill(hidden, 0)
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)


def explicit(name, q, k, v, u, image, visible=None):
    n = q.shape[2]
    a = q @ k.mT / math.sqrt(q.shape[-1])
    a = a if visible is None else a.masked_fill(~visible, -torch.inf)
    mixed = (1 - u) * a.softmax(-1) + u * target_map(name, q, k, image, visible)
    assert mixed.shape[-1] == n
    return mixed @ v


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=12, deadline=None)
@given(
    image_tokens=st.integers(1, 9), text=st.integers(1, 6), first=st.booleans(), dim=st.integers(1, 5),
    heads=st.integers(1, 3), batch=st.integers(1, 2), u=st.floats(0, 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_formulas_equal_explicit_maps_for_random_shapes_in_both_orders(
    name, image_tokens, text, first, dim, heads, batch, u, seed
):
    q, k, v = draw(batch, heads, image_tokens + text, dim, seed)
    image = slice(0, image_tokens) if first else slice(text, image_tokens + text)
    found = soft_perturb_attention(q, k, v, strength=u, target=name, image=image)
    torch.testing.assert_close(found, explicit(name, q, k, v, u, image), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", TARGETS)
def test_bfloat16_is_within_two_hundredths(name):
    q, k, v = draw(length=24, dim=16, dtype=torch.bfloat16)
    found = soft_perturb_attention(q, k, v, strength=0.6, target=name, image=slice(0, 16))
    assert found.dtype == torch.bfloat16
    want = explicit(name, *(t.double() for t in (q, k, v)), 0.6, slice(0, 16))
    assert (found.double() - want).abs().max() < 2e-2 * want.abs().max()


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("per_row", [False, True])
def test_a_mask_hides_keys(name, per_row):
    q, k, v = draw(length=9)
    gen = torch.Generator().manual_seed(3)
    visible = torch.rand(9 if per_row else 1, 9, generator=gen) > 0.4
    visible = visible.expand(9, 9).clone()
    visible[:, [0, 1, 7, 8]] = True  # of both streams some key is there
    visible.fill_diagonal_(True)  # a token that does not see itself has no identity to go to
    image = slice(0, 6)
    for mask in (visible[None, None], torch.zeros(1, 1, 9, 9).masked_fill(~visible, -torch.inf)):
        found = soft_perturb_attention(q, k, v, strength=0.7, target=name, image=image, mask=mask)
        torch.testing.assert_close(found, explicit(name, q, k, v, 0.7, image, visible), rtol=1e-12, atol=1e-12)


def test_two_tokens_by_hand():
    q = k = torch.eye(2, dtype=torch.float64)[None, None]
    v = torch.diag(tensor([2.0, 4.0], dtype=torch.float64))[None, None]
    want = {
        0.0: [[1.3395, 1.3210], [0.6605, 2.6790]],
        0.5: [[1.6698, 0.6605], [0.3302, 3.3395]],
        1.0: [[2.0, 0.0], [0.0, 4.0]],
    }
    for u, rows in want.items():
        found = soft_perturb_attention(q, k, v, strength=u)[0, 0]
        torch.testing.assert_close(found, tensor(rows, dtype=torch.float64), rtol=0, atol=5e-5)


def test_strength_one_in_all_heads_gives_the_values():
    q, k, v = draw(dtype=torch.float32)
    assert torch.equal(soft_perturb_attention(q, k, v, strength=1), v)


@pytest.mark.parametrize("name", TARGETS)
def test_strength_zero_and_other_heads_are_bit_identical(name):
    q, k, v = draw(length=12, dtype=torch.float32)
    plain = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(soft_perturb_attention(q, k, v, strength=0, target=name, image=slice(0, 8)), plain)
    assert torch.equal(soft_perturb_attention(q, k, v, strength=1, heads=[], target=name, image=slice(0, 8)), plain)
    found = soft_perturb_attention(q, k, v, strength=1, heads=[1], target=name, image=slice(0, 8))
    assert torch.equal(found[:, [0, 2]], plain[:, [0, 2]])
    assert not torch.equal(found[:, 1], plain[:, 1])
    text_rows, image_rows = found[:, 1, 8:], found[:, 1, :8]
    if name in STREAMS:  # only the rows of one stream change
        kept, same = (
            (text_rows, plain[:, 1, 8:]) if name[0] == "i" or "image" in name else (image_rows, plain[:, 1, :8])
        )
        assert torch.equal(kept, same)


@pytest.mark.parametrize("name", TARGETS)
def test_rows_of_the_map_sum_to_one_and_the_output_is_affine_in_strength(name):
    q, k, v = draw(length=9)
    image = slice(3, 9)
    if not name.endswith("zero"):
        ones = soft_perturb_attention(q, k, torch.ones_like(v), strength=0.37, target=name, image=image)
        torch.testing.assert_close(ones, torch.ones_like(v), rtol=0, atol=1e-14)
    low, mid, high = (soft_perturb_attention(q, k, v, strength=u, target=name, image=image) for u in (0.1, 0.4, 0.7))
    torch.testing.assert_close(low - 2 * mid + high, torch.zeros_like(v), rtol=0, atol=1e-14)


def test_each_head_has_its_own_strength():
    q, k, v = draw()
    found = soft_perturb_attention(q, k, v, strength=[0.2, 1.0], heads=[0, 2])
    plain = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(found[:, 0], 0.8 * plain[:, 0] + 0.2 * v[:, 0], rtol=1e-14, atol=1e-14)
    assert torch.equal(found[:, 1], plain[:, 1])
    assert torch.equal(found[:, 2], v[:, 2])


@pytest.mark.parametrize("name", ["identity", "uniform", "max", "image_renorm"])
def test_grouped_values_go_to_their_query_heads(name):
    q, k, v = draw(heads=6, kv=2, length=8)
    wide = [t.repeat_interleave(3, 1) for t in (k, v)]
    for heads in (None, [1, 4]):
        few = soft_perturb_attention(q, k, v, strength=0.5, heads=heads, target=name, image=slice(0, 5))
        many = soft_perturb_attention(q, *wide, strength=0.5, heads=heads, target=name, image=slice(0, 5))
        torch.testing.assert_close(few, many, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", [n for n in TARGETS if n != "max"])
def test_gradients(name):
    q, k, v = (t.requires_grad_() for t in draw(1, 2, 4, 2))
    u = tensor([0.4, 0.6], dtype=torch.float64, requires_grad=True)

    def run(q, k, v, u):
        return soft_perturb_attention(q, k, v, strength=u, target=name, image=slice(0, 2))

    assert torch.autograd.gradcheck(run, (q, k, v, u))


def test_blocks_of_rows_give_the_same(monkeypatch):
    q, k, v = draw(length=20)
    names = ("max", "image_identity")
    want = [soft_perturb_attention(q, k, v, strength=0.5, target=n, image=slice(0, 15)) for n in names]
    monkeypatch.setattr("eff_guidance.head_guidance.targets._BLOCK", 100)
    for name, whole in zip(names, want, strict=True):
        assert torch.equal(soft_perturb_attention(q, k, v, strength=0.5, target=name, image=slice(0, 15)), whole)


# --- paths other than the straight line -------------------------------------------------------------------------------


def slerp_map(a, u):
    eye = torch.eye(a.shape[-1], dtype=a.dtype)
    theta = a.diagonal(dim1=-2, dim2=-1)[..., None].sqrt().clamp(max=1).acos()
    s = (torch.sin(u * theta) * eye + torch.sin((1 - u) * theta) * a.sqrt()) / theta.sin()
    return s**2 / (s**2).sum(-1, keepdim=True)


def test_slerp_by_hand_and_as_a_map():
    a = tensor([[0.6698, 0.3302], [0.3302, 0.6698]], dtype=torch.float64)
    q = k = torch.eye(2, dtype=torch.float64)[None, None]
    found = soft_perturb_attention(q, k, torch.eye(2, dtype=torch.float64)[None, None], strength=0.5, path="slerp")
    torch.testing.assert_close(found[0, 0, 0], tensor([0.9092, 0.0908], dtype=torch.float64), rtol=0, atol=5e-5)
    assert a[0, 0].sqrt().acos() == pytest.approx(0.6122, abs=1e-4)
    q, k, v = draw(length=6)
    a = (q @ k.mT / 2).softmax(-1)
    found = soft_perturb_attention(q, k, v, strength=0.3, path="slerp", heads=[0, 2])
    torch.testing.assert_close(found[:, [0, 2]], (slerp_map(a, 0.3) @ v)[:, [0, 2]], rtol=1e-12, atol=1e-12)
    assert torch.equal(found[:, 1], F.scaled_dot_product_attention(q, k, v)[:, 1])


def test_slerp_of_a_row_that_is_one_hot_already():
    q = k = 100 * torch.eye(3, dtype=torch.float64)[None, None]
    v = torch.randn(1, 1, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = soft_perturb_attention(q, k, v, strength=0.5, path="slerp")
    torch.testing.assert_close(found, v)


def test_log_linear_is_a_geometric_mean():
    q, k, v = draw(length=6)
    a = (q @ k.mT / 2).softmax(-1)
    p = torch.eye(6, dtype=torch.float64) + 1e-6
    mixed = p**0.3 * a**0.7
    found = soft_perturb_attention(q, k, v, strength=0.3, path="log_linear")
    torch.testing.assert_close(found, mixed / mixed.sum(-1, keepdim=True) @ v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", ["slerp", "log_linear"])
def test_paths_begin_at_the_map_and_end_at_the_identity(path):
    q, k, v = draw(length=6)
    torch.testing.assert_close(
        soft_perturb_attention(q, k, v, strength=0, path=path), F.scaled_dot_product_attention(q, k, v)
    )
    torch.testing.assert_close(soft_perturb_attention(q, k, v, strength=1, path=path), v, rtol=0, atol=1e-4)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"strength": 1.5}, "strength=1.5; use 0 to 1"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"strength": [0.5, 0.5]}, "2 strengths for 3 heads"),
        ({"target": "noise"}, "target='noise'; use one of identity"),
        ({"heads": [3]}, r"heads must be in 0..2"),
        ({"target": "ii_zero"}, "no text beside the image"),
        ({"target": "uniform", "path": "slerp"}, "'log_linear' with 'identity'"),
        ({"path": "spiral"}, "path='spiral'"),
        ({"image": slice(1, 3)}, "the image must come first or last"),
        ({"image": slice(0, 7)}, "the image must come first or last"),
    ],
)
def test_bad_arguments_are_named(change, text):
    with pytest.raises(ValueError, match=text):
        soft_perturb_attention(*draw(), **{"strength": 0.5, **change})


def test_cross_attention_has_no_identity():
    q, k, v = draw()
    with pytest.raises(ValueError, match="7 queries and 5 keys"):
        soft_perturb_attention(q, k[:, :, :5], v[:, :, :5], strength=0.5)
    with pytest.raises(ValueError, match="do not fit"):
        soft_perturb_attention(q, k, v[:, :, :5], strength=0.5)
