"""A model in training: one `update` at a time, with a state that continues it exactly. Usable without run folders."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eff_train.frame.data import to_device
from eff_train.frame.metrics import Means
from eff_train.frame.optimize import Average, learning_rate, swapped
from eff_train.frame.parallel import Loss, Workers, laid_out_as, whole
from eff_train.frame.randomness import own_randomness, random_state, seed_all, set_random_state
from eff_train.frame.recipe import Recipe


class Training:
    """Model, optimizer, average and random state of a recipe.

    Example:
        >>> training = Training(recipe, Workers(0, 1, torch.device("cpu")))
        >>> for _ in range(100):
        ...     training.update()

    Attributes:
        step: Updates done.
        means: Metrics since they were last read.
    """

    def __init__(self, recipe: Recipe[Any], workers: Workers) -> None:
        self.recipe, self.workers, self.config = recipe, workers, recipe.config
        seed_all(self.config.seed)
        self.model = recipe.build().to(workers.device)
        self.frozen = _fingerprint(self.model)
        units = list(recipe.units(self.model)) if workers.sharded else []
        self.loss = workers.wrap(Loss(recipe, self.model), units, unused=recipe.unused_parameters)
        self.optimizer = recipe.optimizer(recipe.groups(self.model))
        self.average = Average(self.model, self.config.ema) if self.config.ema else None
        self.step = 0
        self.means = Means()
        self._seed_process()

    def update(self) -> None:
        """Change the weights once, by the samples of this step."""
        c, ranks = self.config, self.workers
        share = ranks.share(range(self.step * c.batch_size, (self.step + 1) * c.batch_size))
        if len(share) % c.accumulate:
            raise ValueError(f"a process's {len(share)} samples cannot be split into accumulate={c.accumulate} parts")
        size = len(share) // c.accumulate
        parts = [self.recipe.batch(share[i : i + size]) for i in range(0, len(share), size)]
        weights = [float(self.recipe.weight(part)) for part in parts]
        (total,) = ranks.total([sum(weights)])
        rate = learning_rate(self.step, c)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.model.train()
        for i, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            with ranks.hold_gradients(self.loss, last=i == len(parts) - 1):
                with torch.autocast(ranks.device.type, torch.bfloat16, enabled=c.precision == "bfloat16"):
                    loss, metrics = self.loss(to_device(part, ranks.device))
                # DDP and FSDP average gradients over processes: the count of them turns that into the sum.
                (loss * (weight * ranks.count / total)).backward()
            self.means.add({"loss": loss, **metrics}, weight)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, c.clip if c.clip else math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.model, self.step)
        self.means.add({"grad_norm": norm.full_tensor() if hasattr(norm, "full_tensor") else norm, "lr": rate})
        self.step += 1

    def read_means(self) -> dict[str, float]:
        """Metrics over all processes since the last call. All processes must call this.

        Raises:
            FloatingPointError: as `check_finite`.
        """
        self.check_finite()
        everyone = self.workers.collect(self.means.state_dict())
        self.means = Means()
        return self.workers.tell(_merge(everyone))

    def check_finite(self) -> None:
        """Look at the losses and gradients since the means were last read. All processes must call this.

        Raises:
            FloatingPointError: one was not a number, so that the weights are worth nothing.
        """
        sums = {n: float(t) for n, t in self.means.sums.items() if n in ("loss", "grad_norm")}
        bad = [float(not math.isfinite(v)) for v in sums.values()]
        if any(self.workers.total([sum(bad)])):
            seen = ", ".join(f"{n} {v}" for n, v in sums.items() if not math.isfinite(v)) or "on another process"
            raise FloatingPointError(f"no finite loss and gradient in the last updates up to {self.step}: {seen}")

    @contextmanager
    def judged(self) -> Iterator[nn.Module]:
        """The model as it is judged and handed out: averaged weights, evaluation mode, no gradients, own random state.

        On several processes all must enter; the model is usable on the main one.
        """
        weights = self._weights(averaged=True) if self.workers.sharded else {}
        with own_randomness(self.config.seed), torch.no_grad():
            if self.workers.sharded and self.workers.main:
                model = self.recipe.build().to(self.workers.device)
                load_weights(model, weights)
                yield model.eval()
            elif self.average and not self.workers.sharded:
                with swapped(self.model, self.average.values):
                    yield self.model.eval()
            else:
                yield self.model.eval()

    def state_dict(self) -> dict[str, Any]:
        """Everything that continues this training, in whole tensors on the CPU.

        On several processes all must call this; the result is complete on the main one. It does not depend on their
        number, except for ``processes``: a random state and a state of the data for each.
        """
        names = [n for n, _ in self._optimized()]
        states = self.optimizer.state_dict()["state"]
        moments = {names[i]: {k: _part(v) for k, v in state.items()} for i, state in states.items()}
        own = {"random": random_state(), "data": self.recipe.data_state(), "means": self.means.state_dict()}
        return {
            "step": self.step,
            "frozen": self.frozen,
            "weights": self._weights(averaged=False),
            "average": {n: whole(v) for n, v in self.average.values.items()} if self.average else {},
            "optimizer": moments,
            "processes": self.workers.collect(own),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave, on any number of processes.

        With the same number the updates that follow are the same bit for bit (on the CPU). With another number each
        process starts a random state of its own, so that only what `batch` draws by number stays the same.

        Raises:
            ValueError: frozen weights differ, or data with a state meets another number of processes.
        """
        if state["frozen"] != self.frozen:
            raise ValueError(
                "the frozen weights that the recipe builds are not those that the checkpoint was trained on"
            )
        self.step = state["step"]
        load_weights(self.model, state["weights"])
        if self.average:
            for name, value in state["average"].items():
                self.average.values[name].copy_(laid_out_as(value, self.average.values[name]))
        self._load_optimizer(state["optimizer"])
        processes = state["processes"]
        if len(processes) == self.workers.count:
            own = processes[self.workers.rank]
            self.means.load_state_dict(own["means"], self.workers.device)
            self.recipe.load_data_state(own["data"])
            set_random_state(own["random"])
            return
        if any(p["data"] for p in processes):
            raise ValueError(
                f"data with a state must be resumed on {len(processes)} processes, not {self.workers.count}"
            )
        if self.workers.main:
            self.means = _joined([p["means"] for p in processes], self.workers.device)
        self._seed_process()

    def _seed_process(self) -> None:
        seed_all(self.config.seed, 1 + self.step, self.workers.rank)

    def _optimized(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters in the order in which the optimizer numbers them, with their names."""
        names = {p: n for n, p in self.model.named_parameters()}
        return [(names[p], p) for group in self.optimizer.param_groups for p in group["params"]]

    def _load_optimizer(self, moments: dict[str, Any]) -> None:
        states = {}
        for i, (name, parameter) in enumerate(self._optimized()):
            if name in moments:
                states[i] = {
                    k: laid_out_as(v, parameter) if isinstance(v, Tensor) and v.shape == parameter.shape else v
                    for k, v in moments[name].items()
                }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": states})

    def _weights(self, *, averaged: bool) -> dict[str, Tensor]:
        values = dict(saved_tensors(self.model))
        if averaged and self.average:
            values |= self.average.values
        return {n: whole(t) for n, t in values.items()}


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds of a model: parameters that are trained, and buffers that belong to its state."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in model.state_dict().items():
        if name not in parameters and isinstance(value, Tensor):
            yield name, value


@torch.no_grad()
def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy saved weights into a model that was built by the same recipe.

    Raises:
        ValueError: names or shapes differ.
    """
    own = dict(saved_tensors(model))
    if missing := sorted(own.keys() ^ weights.keys()):
        raise ValueError(f"weights of the checkpoint and of the model differ in {', '.join(missing[:5])}")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, in the checkpoint {list(weights[name].shape)}")
        tensor.copy_(laid_out_as(weights[name], tensor))


def _part(value: Any) -> Any:
    return whole(value) if isinstance(value, Tensor) else value


def _joined(states: list[dict[str, Any]], device: torch.device) -> Means:
    joined = Means()
    for state in states:
        for name, total in state["sums"].items():
            joined.sums[name] = joined.sums.get(name, torch.zeros((), dtype=torch.float64, device=device)) + total.to(
                device
            )
            joined.weights[name] = joined.weights.get(name, 0.0) + state["weights"][name]
    return joined


def _merge(states: list[dict[str, Any]]) -> dict[str, float]:
    return _joined(states, torch.device("cpu")).read()


def _fingerprint(model: nn.Module) -> str:
    """Checksum of the parameters that are not trained; empty if all are."""
    digest = hashlib.blake2b(digest_size=16)
    frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
    for name, parameter in frozen:
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest() if frozen else ""
