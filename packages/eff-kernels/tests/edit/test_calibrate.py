import copy
import pickle
import threading

import pytest
import torch
from eff_kernels.edit import calibrate, evaluating
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x, attention_mask=None):
        return self.last(input=self.drop(self.first(x)))


def test_rows_are_tokens_without_padding():
    torch.manual_seed(0)
    model, seen = Net(), []
    x, mask = torch.randn(2, 3, 4), torch.tensor([[0, 1, 1], [1, 1, 1]])
    calls = calibrate(model, [{"x": x, "attention_mask": mask}, (x,), x[0]], {"first": lambda c: seen.append(c)})
    assert calls == {"first": 3}
    assert torch.equal(seen[0].rows(seen[0].input), x.reshape(-1, 4)[[1, 2, 3, 4, 5]])
    assert torch.equal(seen[0].rows(seen[0].output), model.first(x).reshape(-1, 4)[[1, 2, 3, 4, 5]])
    assert [len(c.rows(c.input)) for c in seen] == [5, 6, 3]
    assert not seen[0].output.requires_grad


def test_arguments_by_name_count_as_the_input():
    inputs = []
    calibrate(Net(), [torch.ones(3, 4)], {"last": lambda c: inputs.append(c.input.shape)})
    assert inputs == [(3, 4)]


def test_the_model_is_left_as_it_was():
    model = Net()
    model.last.eval()
    modes = [m.training for m in model.modules()]
    outputs = []
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        calibrate(model, [torch.ones(3, 4), torch.ones(3, 5)], {"drop": lambda c: outputs.append((c.input, c.output))})
    assert torch.equal(*outputs[0])  # dropout was off
    assert [m.training for m in model.modules()] == modes
    assert not model.drop._forward_hooks


def test_what_a_function_returns_takes_the_place_of_the_output():
    seen = []
    calibrate(
        Net(),
        [torch.ones(1, 4)],
        {"first": lambda c: torch.zeros_like(c.output), "last": lambda c: seen.append(c.input)},
    )
    assert not seen[0].any()


def test_each_batch_has_its_random_numbers():
    draws = []

    def run(model, batch):
        draws.append(torch.rand(()))
        model(batch)

    model, state = Net(), torch.get_rng_state()
    calibrate(model, [torch.ones(1, 4)] * 2, {}, run=run, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    calibrate(model, [torch.ones(1, 4)] * 2, {}, run=run, seed=6)
    assert draws[1] == draws[2]
    assert draws[0] != draws[1]


def test_other_threads_and_copies_are_not_looked_at():
    model, seen, copies = Net(), [], []

    def run(model, batch):
        copies.extend([copy.deepcopy(model), pickle.loads(pickle.dumps(model))])
        for other in (*copies, model):
            thread = threading.Thread(target=other, args=(batch,))
            thread.start()
            thread.join()
        for other in copies:
            other(batch)
        model(batch)

    assert calibrate(model, [torch.ones(1, 4)], {"first": seen.append}, run=run) == {"first": 1}
    assert len(seen) == 1
    assert all(torch.equal(c(torch.ones(1, 4)).shape and c.first.weight, model.first.weight) for c in copies)


def test_errors():
    with pytest.raises(ValueError, match="there are no batches to calibrate with"):
        calibrate(Net(), [], {})
    with pytest.raises(AttributeError, match="middle"):
        calibrate(Net(), [torch.ones(1, 4)], {"middle": print})


def test_evaluating_puts_modes_back():
    model = Net()
    model.last.eval()

    def fail():
        with evaluating(model):
            assert not any(m.training for m in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.drop.training
    assert not model.last.training
