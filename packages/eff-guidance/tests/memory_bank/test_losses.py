"""The losses against worked examples, explicit formulas in float64, and invariances."""

import math

import pytest
import torch
import torch.nn.functional as F
from eff_guidance.memory_bank import bank_repulsion_loss, dispersive_loss


def unit(*shape, seed=0, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def pairs(z, bank, temperature, *, ids=None, bank_ids=None, include_self=False, reduction="log_mean"):
    """The loss by loops over pairs."""
    rows = []
    for i in range(len(z)):
        row = [z[i] @ k / temperature for j, k in enumerate(bank) if ids is None or ids[i] != bank_ids[j]]
        others = [j for j in range(len(z)) if j != i and (ids is None or ids[i] != ids[j])]
        row += [z[i] @ z[j] / temperature for j in [*others, *([i] if include_self else [])]]
        rows.append(row)
    if reduction == "log_mean":
        return torch.stack([s for row in rows for s in row]).exp().mean().log()
    return torch.stack([torch.stack(row).exp().mean().log() if row else z.sum() * 0 for row in rows]).mean()


def test_dispersive_by_hand():
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert dispersive_loss(points, 1.0).item() == pytest.approx(math.log((2 * math.exp(-1) + 2) / 4), abs=1e-6)
    assert dispersive_loss(points, 1.0).item() == pytest.approx(-0.37989, abs=1e-5)
    assert dispersive_loss(points, 1.0, include_self=False).item() == pytest.approx(-1, abs=1e-6)
    assert dispersive_loss(torch.ones(5, 3)).item() == pytest.approx(0, abs=1e-6)
    z = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
    spread = [dispersive_loss(s * z).item() for s in (0.1, 1.0, 2.0, 100.0)]
    assert spread == sorted(spread, reverse=True)
    assert -math.log(6) - 1e-6 <= spread[-1] < spread[0] <= 0
    assert dispersive_loss(torch.ones(1, 3), include_self=False) == 0


def test_dispersive_equals_pairs_and_its_gradient_is_right():
    z = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = z.flatten(1)
    distance = (flat[:, None] - flat).square().mean(-1)
    assert dispersive_loss(z, 0.7).item() == pytest.approx((-distance / 0.7).exp().mean().log().item(), abs=1e-12)
    cosine = 1 - F.cosine_similarity(flat[:, None], flat, dim=-1)
    wanted = (-cosine / 0.7).exp().mean().log().item()
    assert dispersive_loss(z, 0.7, metric="cosine").item() == pytest.approx(wanted, abs=1e-12)
    for settings in ({}, {"metric": "cosine"}, {"include_self": False}):
        assert torch.autograd.gradcheck(lambda x, s=settings: dispersive_loss(x, 0.7, **s), z.requires_grad_())
    # Large equal parts, as hidden states have them, cancel without loss.
    near = torch.randn(4, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low = dispersive_loss((near + 1000).float(), 0.7)
    assert low.item() == pytest.approx(dispersive_loss(near, 0.7).item(), abs=1e-3)


def test_bank_by_hand():
    z, bank = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    found = bank_repulsion_loss(z, bank, temperature=0.5)
    assert found.item() == pytest.approx(math.log((math.exp(2) + 1 + math.exp(-2)) / 3), abs=1e-6)
    assert found.item() == pytest.approx(1.04432, abs=1e-5)


@pytest.mark.parametrize("reduction", ["log_mean", "mean_log"])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_equal_loops_over_pairs(reduction, chunk):
    z, bank = unit(4, 5).requires_grad_(), unit(7, 5, seed=1)
    wanted = pairs(z, bank, 0.5, reduction=reduction)
    found = bank_repulsion_loss(z, bank, temperature=0.5, reduction=reduction, chunk=chunk)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-12)
    (a,), (b,) = torch.autograd.grad(3 * found, z), torch.autograd.grad(3 * wanted, z)
    assert (a - b).abs().max() < 1e-12
    order = torch.randperm(7)
    other = bank_repulsion_loss(z, bank[order], temperature=0.5, reduction=reduction, chunk=chunk)
    assert other.item() == pytest.approx(found.item(), abs=1e-12)


@pytest.mark.parametrize("reduction", ["log_mean", "mean_log"])
def test_gradients(reduction):
    z, bank = unit(3, 4).requires_grad_(), unit(5, 4, seed=1)
    ids, bank_ids = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 2, 3, 1])
    for more in ({}, {"ids": ids, "bank_ids": bank_ids}, {"valid": torch.arange(5) < 2}, {"in_batch": False}):
        assert torch.autograd.gradcheck(
            lambda x, m=more: bank_repulsion_loss(x, bank, reduction=reduction, chunk=2, **m), z
        )
    bank.requires_grad_()
    bank_repulsion_loss(z, bank).backward()
    assert bank.grad is None
    assert z.grad.abs().sum() > 0


def test_stored_in_16_bit():
    z, bank = unit(6, 32, dtype=torch.float32), unit(200, 32, seed=1, dtype=torch.float32)
    wanted = bank_repulsion_loss(z, bank)
    for dtype in (torch.bfloat16, torch.float16):
        assert bank_repulsion_loss(z, bank.to(dtype)).item() == pytest.approx(wanted.item(), abs=1e-2)
        half = z.to(dtype).requires_grad_()
        found = bank_repulsion_loss(half, bank.to(dtype), temperature=0.005)  # exp(200) overflows all 16-bit types
        assert found.dtype == torch.float32
        assert found.isfinite()
        found.backward()
        assert half.grad.isfinite().all()
        with torch.autocast("cpu", dtype):
            assert torch.equal(bank_repulsion_loss(half, bank.to(dtype), temperature=0.005), found)


def test_without_a_bank_it_is_the_dispersive_loss_of_unit_vectors():
    """Squared distance of unit vectors is 2 - 2 cos: temperature d tau / 2, and 1 / tau apart."""
    z, tau = unit(5, 8), 0.5
    found = bank_repulsion_loss(z, None, temperature=tau, include_self=True)
    assert found.item() == pytest.approx(1 / tau + dispersive_loss(z, 2 * tau / 8).item(), abs=1e-12)
    empty = bank_repulsion_loss(z, z[:0], temperature=tau, include_self=True)
    assert torch.equal(found, empty)
    assert found.item() == pytest.approx(1 / tau + dispersive_loss(z, tau, metric="cosine").item(), abs=1e-12)


@pytest.mark.parametrize("reduction", ["log_mean", "mean_log"])
def test_a_picture_does_not_repel_itself(reduction):
    z, bank = unit(3, 5).requires_grad_(), unit(6, 5, seed=1)
    ids, bank_ids = torch.tensor([4, 5, 4]), torch.tensor([4, 4, 5, 9, 5, 4])
    found = bank_repulsion_loss(z, bank, ids=ids, bank_ids=bank_ids, reduction=reduction, chunk=4)
    wanted = pairs(z, bank, 0.5, ids=ids, bank_ids=bank_ids, reduction=reduction)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-12)

    # What lies in the bank under a picture's own id does not reach it, what lies there under another's does.
    def alone(keys):
        return bank_repulsion_loss(z[1:2], keys, ids=ids[1:2], bank_ids=bank_ids, reduction=reduction)

    changed = [bank.clone(), bank.clone()]
    changed[0][[2, 4]] = unit(2, 5, seed=9)
    changed[1][[0, 1]] = unit(2, 5, seed=9)
    assert torch.equal(alone(changed[0]), alone(bank))
    assert not torch.equal(alone(changed[1]), alone(bank))


@pytest.mark.parametrize("reduction", ["log_mean", "mean_log"])
def test_a_row_without_keys_adds_nothing(reduction):
    z, bank = unit(2, 4).requires_grad_(), unit(3, 4, seed=1)
    same = torch.zeros(3, dtype=torch.int64)
    none = bank_repulsion_loss(z, bank, ids=same[:2], bank_ids=same, reduction=reduction)
    assert none == 0
    (grad,) = torch.autograd.grad(none, z)
    assert torch.equal(grad, torch.zeros_like(z))
    # Row 0 sees nothing: all are of its id, but row 1 is of id 7 and sees the bank.
    ids = torch.tensor([0, 7])
    one = bank_repulsion_loss(z, bank, ids=ids, bank_ids=same, reduction=reduction, in_batch=False)
    alone = bank_repulsion_loss(z[1:], bank, reduction=reduction)
    assert one.item() == pytest.approx(alone.item() / (2 if reduction == "mean_log" else 1), abs=1e-12)
    (grad,) = torch.autograd.grad(one, z)
    assert grad.isfinite().all()
    assert not grad[0].any()
    # Rows that take no part are neither queries nor keys.
    part = bank_repulsion_loss(unit(4, 4), bank, take_part=torch.tensor([1, 0, 1, 0]).bool(), reduction=reduction)
    assert part.item() == pytest.approx(
        bank_repulsion_loss(unit(4, 4)[[0, 2]], bank, reduction=reduction).item(), abs=1e-12
    )
    assert bank_repulsion_loss(unit(1, 4), None, reduction=reduction) == 0


def test_the_step_points_away_from_the_weighted_mean_of_the_negatives():
    z, bank = unit(1, 3).requires_grad_(), unit(9, 3, seed=1)
    found = bank_repulsion_loss(z, bank, temperature=0.3)
    found.backward()
    weights = (bank @ z.detach()[0] / 0.3).softmax(0)
    assert torch.allclose(z.grad[0], weights @ bank / 0.3, atol=1e-12)
    assert -z.grad[0] @ (weights @ bank) < 0
    # Keys spread evenly over the circle pull to no side.
    angle = torch.arange(12, dtype=torch.float64) * math.pi / 6
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    at = circle[:1].clone().requires_grad_()
    bank_repulsion_loss(at, circle, temperature=0.5).backward()
    assert at.grad[0, 0] > 0.1
    assert at.grad[0, 1].abs() < 1e-12


def test_the_bank_makes_the_size_of_the_batch_matter_little():
    bank = unit(4096, 16, seed=3)
    found = [bank_repulsion_loss(unit(64, 16, seed=4)[:b], bank).item() for b in (16, 64)]
    assert abs(found[0] - found[1]) < 0.05


def test_refusals():
    z, bank = unit(3, 4), unit(5, 4)
    ids = torch.arange(3)
    for call, text in (
        (lambda: bank_repulsion_loss(z[0], bank), r"z has shape \[4\]"),
        (lambda: bank_repulsion_loss(z, bank[:, :3]), r"the bank has shape \[5, 3\]; wanted \[K, 4\]"),
        (lambda: bank_repulsion_loss(z, bank, temperature=0.0), "temperature=0.0"),
        (lambda: bank_repulsion_loss(z, bank, ids=ids), "give both or neither"),
        (lambda: bank_repulsion_loss(z, bank, ids=ids[:2], bank_ids=torch.arange(5)), "ids has shape"),
        (lambda: bank_repulsion_loss(z, bank, valid=ids > 0), r"valid has shape \[3\]; wanted \[5\]"),
        (lambda: bank_repulsion_loss(z, bank, chunk=0), "chunk=0"),
        (lambda: bank_repulsion_loss(z, bank, reduction="sum"), "reduction='sum'"),
        (lambda: dispersive_loss(z, -1.0), "temperature=-1.0"),
        (lambda: dispersive_loss(z, metric="l1"), "metric='l1'"),
        (lambda: dispersive_loss(z[0]), "wanted"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
