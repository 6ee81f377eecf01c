"""One training without a run folder: its gradient, its exact state, what it refuses."""

import math
from dataclasses import dataclass

import pytest
import torch
from eff_train.frame import Recipe, TrainConfig, Training, Workers, torch_generator
from eff_train.frame.training import load_weights, saved_tensors
from torch import nn

ALONE = Workers(0, 1, torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Options.

    Attributes:
        unlearnt: Value of the frozen parameter.
    """

    steps: int = 6
    batch_size: int = 4
    lr: float = 0.1
    clip: float = 0.0
    unlearnt: float = 1.0


class Words(Recipe[Config]):
    """Rows of different length, whose loss is a mean over all terms."""

    def build(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 1))
        model.register_parameter("scale", nn.Parameter(torch.full((), self.config.unlearnt), requires_grad=False))
        return model

    def batch(self, samples):
        rows = [torch.randn(i % 3 + 1, 3, generator=torch_generator(self.config.seed, i)) for i in samples]
        return torch.cat(rows)

    def weight(self, batch):
        return len(batch)

    def loss(self, model, batch):
        out = model[3](model[0](batch)) * model.scale  # the norm would see other rows in parts of a batch
        return (out - batch.sum(1, keepdim=True)).square().mean(), {"rows": float(len(batch))}

    def evaluate(self, model):
        return {"training": float(model.training), "noise": float(torch.rand(()))}


def test_parts_of_a_batch_give_the_gradient_of_the_whole():
    """The mean runs over the rows of the whole batch, however unevenly they fall into parts."""
    ends = []
    for accumulate in (1, 4):
        training = Training(Words(Config(accumulate=accumulate)), ALONE)
        for _ in range(3):
            training.update()
        ends.append(training)
    whole, parts = (dict(t.model.named_parameters()) for t in ends)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-5, atol=1e-6)
    assert ends[0].read_means()["loss"] == pytest.approx(ends[1].read_means()["loss"], rel=1e-5)


def test_update_against_a_plain_loop():
    config = Config(warmup=2, weight_decay=0.1, clip=0.5)
    recipe = Words(config)
    training = Training(recipe, ALONE)
    model = recipe.build()
    model.load_state_dict(training.model.state_dict())
    optimizer = torch.optim.AdamW(recipe.groups(model), betas=config.betas, weight_decay=0.1)
    for step, rate in enumerate((0.05, 0.1, 0.1)):
        training.update()
        loss, _ = recipe.loss(model, recipe.batch(range(4 * step, 4 * step + 4)))
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(model.parameters(), training.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_groups_scale_the_rate():
    class Scaled(Words):
        def groups(self, model):
            return [{"params": [model[0].weight], "lr_scale": 0.0}, {"params": [model[3].weight]}]

    training = Training(Scaled(Config()), ALONE)
    before = [training.model[i].weight.detach().clone() for i in (0, 3)]
    training.update()
    assert torch.equal(training.model[0].weight, before[0])
    assert not torch.equal(training.model[3].weight, before[1])


def test_frozen_weights_are_not_saved_but_watched():
    training = Training(Words(Config()), ALONE)
    names = dict(saved_tensors(training.model))
    assert "scale" not in names
    assert "2.running_mean" in names  # a buffer
    state = training.state_dict()
    Training(Words(Config()), ALONE).load_state_dict(state)
    with pytest.raises(ValueError, match="frozen weights"):
        Training(Words(Config(unlearnt=2.0)), ALONE).load_state_dict(state)


def test_weights_of_another_model_are_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="differ in other"):
        load_weights(model, {**model.state_dict(), "other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"weight is \[2, 2\], in the checkpoint \[3, 2\]"):
        load_weights(model, {"bias": torch.zeros(2), "weight": torch.zeros(3, 2)})


def test_another_number_of_processes():
    state = Training(Words(Config()), ALONE).state_dict()
    state["processes"] = [{**state["processes"][0], "means": {"sums": {}, "weights": {}}}] * 2
    Training(Words(Config()), ALONE).load_state_dict(state)
    state["processes"][0]["data"] = {"position": 3}
    with pytest.raises(ValueError, match="must be resumed on 2 processes, not 1"):
        Training(Words(Config()), ALONE).load_state_dict(state)


def test_data_with_a_state():
    class Stream(Words):
        position = 0

        def batch(self, samples):
            self.position += 1
            return super().batch(range(self.position, self.position + len(samples)))

        def data_state(self):
            return {"position": self.position}

        def load_data_state(self, state):
            self.position = state["position"]

    ends = []
    for breaks in (False, True):
        training = Training(Stream(Config()), ALONE)
        for step in range(4):
            if breaks and step == 2:
                state, training = training.state_dict(), Training(Stream(Config()), ALONE)
                training.load_state_dict(state)
            training.update()
        ends.append(training.model[3].weight)
    assert torch.equal(*ends)
    with pytest.raises(ValueError, match="keeps no state of its data"):
        Words(Config()).load_data_state({"position": 1})


def test_judging_disturbs_nothing():
    training = Training(Words(Config(ema=0.5)), ALONE)
    training.update()
    before = training.state_dict()
    with training.judged() as model:
        first = training.recipe.evaluate(model)
        averaged = model[3].weight.detach().clone()
    assert first["training"] == 0
    assert torch.equal(averaged, before["average"]["3.weight"])
    assert not torch.equal(averaged, before["weights"]["3.weight"])
    assert torch.equal(training.model[3].weight, before["weights"]["3.weight"])
    assert torch.equal(torch.get_rng_state(), before["processes"][0]["random"]["torch"])
    with training.judged() as model:
        assert training.recipe.evaluate(model) == first


def test_no_finite_loss_is_an_error():
    class Broken(Words):
        def loss(self, model, batch):
            loss, _ = super().loss(model, batch)
            return loss * math.inf, {}

    training = Training(Broken(Config()), ALONE)
    training.update()
    with pytest.raises(FloatingPointError, match="loss inf"):
        training.read_means()


def test_bfloat16_is_used_in_the_forward_pass():
    kinds = []

    class Seen(Words):
        def loss(self, model, batch):
            kinds.append(model[0](batch).dtype)
            return super().loss(model, batch)

    for precision in ("bfloat16", "float32"):
        training = Training(Seen(Config(precision=precision)), ALONE)
        training.update()
        assert training.model[0].weight.dtype == torch.float32
    assert kinds == [torch.bfloat16, torch.float32]


def test_shares_of_a_batch():
    shares = [Workers(r, 3, torch.device("cpu")).share(range(6, 12)) for r in range(3)]
    assert shares == [range(6, 8), range(8, 10), range(10, 12)]
    with pytest.raises(ValueError, match="batch_size=4 cannot be shared evenly by 3 processes"):
        Workers(0, 3, torch.device("cpu")).share(range(4))


def test_config_class_comes_from_the_annotation():
    class Child(Words):
        pass

    assert Words.config_class is Child.config_class is Config
