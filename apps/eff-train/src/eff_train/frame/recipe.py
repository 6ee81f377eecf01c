"""What a recipe gives to the loop. Everything but `build`, `batch`, `loss` and `evaluate` has a default."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, get_args

import torch
from torch import Tensor, nn

from eff_train.frame.options import TrainConfig

C = TypeVar("C", bound=TrainConfig)
M = TypeVar("M", bound=nn.Module)


class Recipe(Generic[C]):
    """A task to train: its model, its data, its loss and how the result is judged.

    A recipe's module assigns its class to ``RECIPE``; ``class Digits(Recipe[Config])`` says which config it takes.
    Libraries that are not dependencies of eff-train are imported at its top, or inside functions and named in
    ``needs``.

    Attributes:
        needs: Modules (top-level names) that must be there for a run.
        best: Name of the metric of `evaluate` that chooses the best checkpoint, with a sign: ``"+accuracy"`` for more
            is better, ``"-loss"`` for less; empty: the newest is the best. A better evaluation is saved at once.
        thresholds: Bounds that ``eff-train evaluate`` checks: ``thresholds: ClassVar = {"accuracy": (">=", 0.95)}``.
        unused_parameters: Whether some trained parameters may take no part in a batch, which DDP must be told.
        config: The run's options.
        device: Where the model runs.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    best: ClassVar[str] = ""
    thresholds: ClassVar[Mapping[str, tuple[str, float]]] = {}
    unused_parameters: ClassVar[bool] = False
    config_class: ClassVar[type[TrainConfig]] = TrainConfig

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for base in getattr(cls, "__orig_bases__", ()):
            for kind in get_args(base):
                if isinstance(kind, type) and issubclass(kind, TrainConfig):
                    cls.config_class = kind

    def __init__(self, config: C, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)

    def build(self) -> nn.Module:
        """Make the model, on the CPU. The same random state gives the same weights.

        Parameters that do not require a gradient are not in checkpoints: they must come out the same each time (a
        checksum watches over that).
        """
        raise NotImplementedError

    def batch(self, samples: range) -> Any:
        """Make a batch of training data, on the CPU.

        Args:
            samples: Numbers of the samples, counted from 0 at the start of the training. What a number stands for must
                depend on nothing but the config: several processes then see what one would see, and a resumed run what
                an unbroken one would. See `shuffled` and `generator`.

        Returns:
            Tensors, or tuples, lists, dicts and dataclasses of them; the loop moves them to the device.
        """
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Return the mean loss of a batch and further metrics to log (scalars; they are averaged)."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Judge the model, which is in evaluation mode and without gradients. One process alone calls this."""
        raise NotImplementedError

    def weight(self, batch: Any) -> float:
        """How many terms the mean in `loss` runs over, where that differs from batch to batch (tokens, pixels).

        Parts of a batch (of `accumulate` and of several processes) are averaged with these weights, so that the
        gradient is that of the whole batch at once.
        """
        return 1.0

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups of parameters for the optimizer: ``params``, and if wanted ``lr_scale`` and ``weight_decay``."""
        trained = [p for p in model.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if p.ndim >= 2]},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over `groups`. The loop sets ``lr`` of each group before each step."""
        c = self.config
        return torch.optim.AdamW(groups, lr=c.lr, betas=c.betas, weight_decay=c.weight_decay)

    def units(self, model: nn.Module) -> Iterable[nn.Module]:
        """Modules that ``--parallel fsdp`` gathers and frees together, inner ones first; by default items of lists."""
        for module in model.modules():
            if isinstance(module, nn.ModuleList):
                yield from (m for m in module if any(True for _ in m.parameters()))

    def data_state(self) -> dict[str, Any]:
        """State of the data for a checkpoint, for a recipe whose `batch` cannot depend on numbers alone.

        Tensors, numbers, text, lists and dicts. A run with such a state resumes on the same number of processes only.
        """
        return {}

    def load_data_state(self, state: dict[str, Any]) -> None:
        """Take over what `data_state` gave."""
        if state:
            raise ValueError(
                f"{type(self).__name__} keeps no state of its data, but the checkpoint holds {list(state)}"
            )

    def samples(self, model: nn.Module, folder: Path) -> None:
        """Write pictures (.png) and texts (.txt) that show what the model does; the report shows them by name."""

    def predict(self, model: nn.Module, file: Path, out: Path) -> str:
        """Run the model on a file of the user; write what is not text into the folder ``out``, return the answer."""
        raise NotImplementedError

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the finished model for use elsewhere; by default its weights as ``model.safetensors``."""
        from safetensors.torch import save_model

        save_model(model, str(folder / "model.safetensors"))


def as_built(model: nn.Module, kind: type[M]) -> M:
    """The model as one of the class that its recipe builds.

    Raises:
        TypeError: it is of another class.
    """
    if not isinstance(model, kind):
        raise TypeError(f"the model is a {type(model).__name__}, wanted {kind.__name__}")
    return model
