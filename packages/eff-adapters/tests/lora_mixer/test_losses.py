import math

import pytest
import torch
from eff_adapters.lora_mixer import specialization_balance_loss

ROWS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6]], dtype=torch.float64)
SMALL = {"balance_coef": 0.01, "entropy_coef": 0.01, "scale_balance": False}


@pytest.mark.parametrize(("mode", "total"), [("as_printed", -0.0047227), ("peaked", 0.0117227)])
def test_worked_example(mode, total):
    # mean p = (.4, .375, .225), top-1 use = (.5, .25, .25)
    found = specialization_balance_loss(ROWS, mode=mode, **SMALL)
    assert found.balance.item() == pytest.approx(0.35, abs=1e-12)
    assert found.entropy.item() == pytest.approx(0.822267, abs=5e-7)
    assert found.total.item() == pytest.approx(total, abs=5e-8)


def test_mutual_information_of_the_worked_example():
    mean = torch.tensor([0.4, 0.375, 0.225], dtype=torch.float64)
    of_mean = -(mean * mean.log()).sum().item()
    found = specialization_balance_loss(ROWS, mode="mutual_information", **SMALL)
    assert found.total.item() == pytest.approx(-0.01 * (of_mean - 0.822267), abs=1e-8)


def test_mutual_information_is_bounded():
    sure = torch.eye(4, dtype=torch.float64).repeat(3, 1)
    lowest = specialization_balance_loss(sure, mode="mutual_information", entropy_coef=1.0).total
    assert lowest.item() == pytest.approx(-math.log(4))
    even = torch.full((5, 4), 0.25)
    assert specialization_balance_loss(even, mode="mutual_information", entropy_coef=1.0).total.item() == pytest.approx(
        0, abs=1e-6
    )


def test_uniform_routes_and_the_factor_of_experts():
    even = torch.full((6, 3), 1 / 3, dtype=torch.float64)
    assert specialization_balance_loss(even, scale_balance=False).balance.item() == pytest.approx(1 / 3)
    assert specialization_balance_loss(even).balance.item() == pytest.approx(1.0)
    assert specialization_balance_loss(even).entropy.item() == pytest.approx(math.log(3))


def test_use_may_count_several_experts():
    # top-2 use: each of the rows 1 to 3 uses experts 1 and 2, the last 3 and one of 1 and 2, which tie
    rows = ROWS.clone()
    rows[3] = torch.tensor([0.15, 0.25, 0.6])
    found = specialization_balance_loss(rows, usage_k=2, scale_balance=False)
    mean, use = rows.mean(0), torch.tensor([3, 4, 1]) / 8
    assert found.balance.item() == pytest.approx((mean * use).sum().item())


@pytest.mark.parametrize("mode", ["peaked", "as_printed", "mutual_information"])
def test_gradient(mode):
    logits = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0])

    def loss(x):
        return specialization_balance_loss(x.softmax(-1), mask, mode=mode, balance_coef=0.3, entropy_coef=0.7).total

    assert torch.autograd.gradcheck(loss, logits)
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    assert not gradient[mask == 0].any()
    assert gradient[mask == 1].any(1).all()


def test_gradient_of_the_printed_form_is_that_of_the_paper():
    """alpha fbar_i / M + lambda (log p_i + 1) / M with respect to p_i(x) (equation 9), up to the multiplier."""
    p = ROWS.clone().requires_grad_()
    specialization_balance_loss(p, mode="as_printed", **SMALL).total.backward()
    use = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    torch.testing.assert_close(p.grad, (0.01 * use + 0.01 * (ROWS.log() + 1)) / 4)


def test_a_masked_token_changes_nothing():
    noise = torch.cat([ROWS, torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)])
    mask = torch.tensor([True, True, True, True, False])
    assert specialization_balance_loss(noise, mask) == specialization_balance_loss(ROWS)


def test_shapes_of_a_batch():
    found = specialization_balance_loss(ROWS.view(2, 2, 3), torch.ones(2, 2))
    assert found == specialization_balance_loss(ROWS)


def test_impossible_experts_give_finite_gradients():
    logits = torch.tensor([[0.3, 0.1, -math.inf], [0.0, 2.0, -math.inf]], requires_grad=True)
    specialization_balance_loss(logits.softmax(-1)).total.backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"mask": torch.ones(3)}, r"\[4\], got \[3\]"),
        ({"mask": torch.zeros(4)}, "no token counts"),
        ({"usage_k": 4}, "usage_k=4"),
        ({"mode": "flat"}, "mode='flat'"),
    ],
)
def test_wrong_arguments(more, text):
    with pytest.raises(ValueError, match=text):
        specialization_balance_loss(ROWS, **more)
