"""Shares of attention against whole weights in float64."""

import pytest
import torch
import torch.nn.functional as F
from eff_guidance.context_brush import attend_with_lse, head_gains_from_mass, shift_attention_output

TEXT, SUBJECT, QUERY = slice(0, 5), slice(5, 14), slice(14, 23)
SOURCES = {"subject": (SUBJECT, 0.3), "text": (TEXT, 0.2)}


def tensors(seed=0, dtype=torch.float64, length=23):
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, length, 8, generator=draw, dtype=torch.float64).to(dtype) for _ in range(3))


def by_hand(q, k, v, query, sources):
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    out = weights @ v
    for keys, factor in sources.values():
        out[:, :, query] += factor * weights[:, :, query][..., keys] @ v[:, :, keys]
    return out, {name: weights[:, :, query][..., keys].sum(-1) for name, (keys, _) in sources.items()}


@pytest.mark.parametrize("graph", [False, True])
def test_fused_is_the_whole_matrix(graph):
    q, k, v = (t.requires_grad_(graph) for t in tensors())
    got = shift_attention_output(q, k, v, query=QUERY, sources=SOURCES)
    want, masses = by_hand(q, k, v, QUERY, SOURCES)
    assert (got.out - want).abs().max() < 1e-12
    for name, mass in masses.items():
        assert (got.masses[name] - mass).abs().max() < 1e-12


def test_half_precision():
    q, k, v = tensors(dtype=torch.bfloat16)
    got = shift_attention_output(q, k, v, query=QUERY, sources=SOURCES)
    want, _ = by_hand(*(t.double() for t in (q, k, v)), QUERY, SOURCES)
    assert got.out.dtype == torch.bfloat16
    assert got.masses["text"].dtype == torch.float32
    assert ((got.out.double() - want).norm() / want.norm()) < 3e-2


def test_gradients():
    q, k, v = (t[:1, :1, :, :2].detach().requires_grad_() for t in tensors())
    torch.autograd.gradcheck(lambda *x: shift_attention_output(*x, query=QUERY, sources=SOURCES).out, (q, k, v))


def test_other_rows_are_untouched():
    q, k, v = tensors(dtype=torch.float32)
    plain = F.scaled_dot_product_attention(q, k, v)
    got = shift_attention_output(q, k, v, query=QUERY, sources=SOURCES).out
    assert torch.equal(got[:, :, :14], plain[:, :, :14])
    assert (got[:, :, 14:] != plain[:, :, 14:]).any(-1).all()


def test_without_weight_nothing_changes():
    q, k, v = tensors(dtype=torch.float32)
    got = shift_attention_output(q, k, v, query=QUERY, sources={"subject": (SUBJECT, 0.0), "text": (TEXT, 0.0)}).out
    assert torch.equal(got, F.scaled_dot_product_attention(q, k, v))


def test_affine_in_each_weight():
    q, k, v = tensors()

    def out(image, text):
        return shift_attention_output(
            q, k, v, query=QUERY, sources={"subject": (SUBJECT, image), "text": (TEXT, text)}
        ).out

    assert (out(0.8, 0.1) - out(0, 0.1) - 2 * (out(0.4, 0.1) - out(0, 0.1))).abs().max() < 1e-13
    assert (out(0.1, 0.8) - out(0.1, 0) - 2 * (out(0.1, 0.4) - out(0.1, 0))).abs().max() < 1e-13
    assert (out(0.8, 0.1) - out(0, 0.1)).abs().max() > 1e-3


def test_with_nothing_of_its_own_a_row_grows():
    """If rows see no key but those of the sources, equal weights scale them."""
    q, k, v = tensors(length=14)
    sources = {"subject": (SUBJECT, 0.3), "text": (TEXT, 0.3)}
    got = shift_attention_output(q, k, v, query=slice(0, 14), sources=sources)
    assert (got.out - 1.3 * F.scaled_dot_product_attention(q, k, v)).abs().max() < 1e-13
    assert torch.equal(got.masses["rest"], torch.zeros_like(got.masses["rest"]))


def test_masses_sum_to_one():
    got = shift_attention_output(*tensors(), query=QUERY, sources=SOURCES).masses
    assert set(got) == {"subject", "text", "rest"}
    assert (sum(got.values()) - 1).abs().max() < 1e-13


def test_scattered_rows_and_keys_are_gathered():
    q, k, v = tensors()
    order = torch.randperm(23, generator=torch.Generator().manual_seed(3))
    where = {name: torch.argsort(order)[keys].sort().values for name, keys in (("subject", SUBJECT), ("text", TEXT))}
    query = torch.argsort(order)[QUERY].sort().values
    mixed = shift_attention_output(
        *(t[:, :, order] for t in (q, k, v)), query=query,
        sources={"subject": (where["subject"], 0.3), "text": (where["text"], 0.2)},
    )  # fmt: skip
    want = shift_attention_output(q, k, v, query=QUERY, sources=SOURCES)
    assert (mixed.out - want.out[:, :, order]).abs().max() < 1e-12


def test_log_sum_exp_of_both_ways():
    q, k, v = tensors()
    fused = attend_with_lse(q, k, v, 0.3)
    opened = attend_with_lse(q.requires_grad_(), k, v, 0.3)
    assert (fused.lse - opened.lse).abs().max() < 1e-12
    assert (fused.out - opened.out).abs().max() < 1e-12


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_on_a_gpu(dtype):
    q, k, v = (t.to("cuda", dtype) for t in tensors())
    got = shift_attention_output(q, k, v, query=QUERY, sources=SOURCES)
    want, masses = by_hand(*(t.double() for t in (q, k, v)), QUERY, SOURCES)
    assert ((got.out.double() - want).norm() / want.norm()) < 3e-2
    assert (got.masses["text"] - masses["text"]).abs().max() < 2e-2


def test_gains():
    gains = head_gains_from_mass(torch.tensor([[0.2, 0.6, 1.0], [5.0, 5.0, 5.0]]), 0.2)
    assert torch.allclose(gains, torch.tensor([[1.0, 1.1, 1.2], [1.0, 1.0, 1.0]]))
    mass = torch.rand(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gains = head_gains_from_mass(mass, 0.3)
    assert gains.min() == 1
    assert gains.max() <= 1.3
    assert torch.allclose(head_gains_from_mass(7 * mass + 3, 0.3), gains)
    assert torch.equal(head_gains_from_mass(mass[2:3], 0.3), gains[2:3])


def test_gains_of_thousands_of_rows_keep_their_differences():
    mass = torch.tensor([[2300.0, 2301.0, 2302.0]])
    assert head_gains_from_mass(mass, 0.2)[0, 1] == pytest.approx(1.1)


def test_bad_sources():
    q, k, v = tensors()
    with pytest.raises(ValueError, match="share 2 keys"):
        shift_attention_output(q, k, v, query=QUERY, sources={"a": (slice(0, 5), 1.0), "b": (slice(3, 9), 1.0)})
    with pytest.raises(ValueError, match="'rest' is the name"):
        shift_attention_output(q, k, v, query=QUERY, sources={"rest": (slice(0, 5), 1.0)})
