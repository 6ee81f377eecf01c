"""Run a model over some batches and look at its modules on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eff_kernels.edit.handle import Handle

Run = Callable[[nn.Module, Any], object]
"""Runs a model on one batch, such as one rollout of all denoising steps."""


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One call of a module that is looked at.

    Attributes:
        name: Of the module.
        module: The module.
        args, kwargs: What it was called with.
        output: What it returned.
        padding: bool [B, T], False where the batch has padding; None if it has none or does not say.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    padding: Tensor | None

    @property
    def input(self) -> Tensor:
        """The first argument."""
        found: Tensor = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return found

    def rows(self, x: Tensor) -> Tensor:
        """The tokens of ``x`` [..., C] as rows [n, C], without those that are padding where ``x`` is [B, T, C]."""
        x = x.detach()
        rows = x.reshape(-1, x.shape[-1])
        if self.padding is not None and x.ndim == 3 and self.padding.shape == x.shape[:2]:
            rows = rows[self.padding.reshape(-1).to(rows.device)]
        return rows


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    look: Mapping[str, Callable[[ModuleCall], Any]],
    *,
    run: Run | None = None,
    seed: int | None = None,
) -> dict[str, int]:
    """Run a model over batches; each call of a named module is shown to its function.

    The model runs in evaluation mode and without gradients, and is left as it was. Copies of the model and other
    threads that run it meanwhile are not looked at.

    Args:
        model: Any module.
        batches: Each one a mapping of keyword arguments, a tuple of arguments, or a single argument. An
            ``attention_mask`` [B, T] of a mapping marks padding.
        look: By name of a module, what gets a `ModuleCall` of each of its calls; what it returns, unless None, takes
            the place of the module's output.
        run: Runs the model on one batch, in place of calling it.
        seed: Batch i sees the random numbers of ``seed + i``, and the generators are put back; None leaves them alone.

    Returns:
        How often each module was called.

    Raises:
        ValueError: there are no batches.
        AttributeError: the model has no module of such a name.
    """
    calls, batch_count = dict.fromkeys(look, 0), 0
    padding: Tensor | None = None
    thread = threading.get_ident()

    def watch(name: str, module: nn.Module) -> Callable[..., Any]:
        def hook(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if threading.get_ident() != thread:
                return None
            calls[name] += 1
            return look[name](ModuleCall(name, module, args, kwargs, output, padding))

        return hook

    with Handle() as handle, evaluating(model):
        for name in look:
            module = model.get_submodule(name)
            handle.hook(module, watch(name, module))
        for i, batch in enumerate(batches):
            padding = padding_of(batch)
            with nullcontext() if seed is None else torch.random.fork_rng():
                if seed is not None:
                    torch.manual_seed(seed + i)
                (run or call)(model, batch)
            batch_count += 1
    if not batch_count:
        raise ValueError("there are no batches to calibrate with; give at least one")
    return calls


def call(model: nn.Module, batch: Any) -> Any:
    """Call a model with a mapping of keyword arguments, a tuple or list of arguments, or one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def padding_of(batch: Any) -> Tensor | None:
    """The ``attention_mask`` [B, T] of a batch of keyword arguments, as bool: False is padding."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off, and leave each module in the mode in which it was."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
