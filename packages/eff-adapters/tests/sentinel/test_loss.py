import math

import pytest
import torch
from eff_adapters.sentinel import c_dpo_loss, sentence_logps
from torch.nn import functional


def _four(*values):
    return [torch.tensor([v], dtype=torch.float32, requires_grad=True) for v in values]


def test_policy_equal_to_reference():
    given = _four(-20.0, -25.0, -20.0, -25.0)
    out = c_dpo_loss(*given)
    assert float(out.loss.detach()) == pytest.approx(math.log(2), abs=1e-6)
    out.loss.backward()
    assert float(given[0].grad) == pytest.approx(-0.05)


def test_worked_example():
    given = _four(-20.0, -25.0, -22.0, -24.0)
    out = c_dpo_loss(*given, beta=0.1)
    assert float(out.chosen_rewards - out.rejected_rewards) == pytest.approx(0.3, abs=1e-6)
    assert float(out.loss.detach()) == pytest.approx(0.5544, abs=5e-5)
    out.loss.backward()
    assert float(given[0].grad) == pytest.approx(-0.0426, abs=5e-5)
    assert float(given[1].grad) == pytest.approx(0.0426, abs=5e-5)


def test_swapped():
    values = torch.randn(4, 5, dtype=torch.float32) * 10
    chosen, rejected, a, b = values
    one, other = c_dpo_loss(chosen, rejected, a, b, 0.3), c_dpo_loss(rejected, chosen, b, a, 0.3)
    z = one.chosen_rewards - one.rejected_rewards
    torch.testing.assert_close(other.chosen_rewards - other.rejected_rewards, -z)
    torch.testing.assert_close(one.loss - other.loss, -z.mean())


def test_smoothing_is_a_mixture_of_both_ways_round():
    values = torch.randn(4, 5)
    right = c_dpo_loss(*values, 0.2).loss
    wrong = c_dpo_loss(values[1], values[0], values[3], values[2], 0.2).loss
    torch.testing.assert_close(c_dpo_loss(*values, 0.2, 0.1).loss, 0.9 * right + 0.1 * wrong)


def test_bfloat16_does_not_round_the_loss():
    values = torch.tensor([[-200.0], [-250.0], [-200.0], [-249.0]])
    assert torch.equal(c_dpo_loss(*values.bfloat16()).loss, c_dpo_loss(*values.bfloat16().float()).loss)


def _brute(logits, labels):
    found = []
    for b in range(len(labels)):
        total = 0.0
        for t in range(1, labels.shape[1]):
            if labels[b, t] != -100:
                total += float(functional.log_softmax(logits[b, t - 1].double(), 0)[labels[b, t]])
        found.append(total)
    return torch.tensor(found)


def test_sums_by_brute_force():
    logits, labels = torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    labels[0, :3], labels[1, 5:], labels[2, ::2] = -100, -100, -100
    found = sentence_logps(logits, labels)
    torch.testing.assert_close(found, _brute(logits, labels))
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(sentence_logps(logits[order], labels[order]), found[order])
    left = functional.pad(logits, (0, 0, 4, 0)), functional.pad(labels, (4, 0), value=-100)
    right = functional.pad(logits, (0, 0, 0, 4)), functional.pad(labels, (0, 4), value=-100)
    torch.testing.assert_close(sentence_logps(*right), found)
    first = labels[:, :1].clone()  # has no token before it here, but has one behind padding
    torch.testing.assert_close(
        sentence_logps(left[0], left[1].index_fill(1, torch.tensor([4]), -100)), found, msg=str(first)
    )


def test_other_tokens_do_not_count():
    logits, labels = torch.randn(2, 6, 5, requires_grad=True), torch.randint(0, 5, (2, 6))
    labels[:, :4] = -100
    sentence_logps(logits, labels).sum().backward()
    assert (logits.grad[:, :3] == 0).all()
    assert (logits.grad[:, 3:5].abs().sum(-1) > 0).all()
    assert (logits.grad[:, 5] == 0).all()


def test_gradients():
    labels = torch.tensor([[-100, 1, 2, 0]])
    logits = torch.randn(1, 4, 3, requires_grad=True)
    found = torch.autograd.grad(sentence_logps(logits, labels).sum(), logits)[0]
    wanted = torch.zeros(1, 4, 3)
    for t in (1, 2, 3):
        wanted[0, t - 1] = functional.one_hot(labels[0, t], 3) - logits[0, t - 1].detach().softmax(0)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: c_dpo_loss(*torch.zeros(4, 1), beta=0), "beta=0"),
        (lambda: c_dpo_loss(*torch.zeros(4, 1), label_smoothing=0.5), "label_smoothing=0.5"),
        (lambda: c_dpo_loss(*torch.zeros(3, 1), torch.zeros(2)), "for all four"),
        (lambda: c_dpo_loss(*torch.zeros(4, 0)), "for all four"),
        (lambda: sentence_logps(torch.zeros(1, 2, 3), torch.full((1, 2), -100)), "rows \\[0\\] have no token"),
        (lambda: sentence_logps(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.long)), "use \\[B, T, V\\]"),
    ],
)
def test_wrong_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
