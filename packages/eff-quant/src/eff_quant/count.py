"""How many parameters a model has, quantised weights among them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


def count_parameters(model: nn.Module, *, only_trainable: bool = False) -> int:
    """Count the parameters of a model as they were before it was quantised.

    Codes and scales are buffers, which a sum over ``model.parameters()`` leaves out; here a quantised layer has as
    many weights as the linear layer that it stands for.

    Args:
        model: Any module, also one that PEFT has wrapped.
        only_trainable: Leave out what gets no gradient, such as all quantised weights.

    Returns:
        The number; a parameter that is shared counts once.
    """
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad or not only_trainable)
    return counted if only_trainable else counted + hidden_parameters(model)


def hidden_parameters(model: nn.Module) -> int:
    """Weights of a model that are held in buffers as codes."""
    return sum(getattr(module, "num_hidden_parameters", 0) for module in model.modules())


def counting_hidden(num_parameters: Callable[..., int]) -> Callable[..., int]:
    """The method ``num_parameters`` of a library's models, with the weights that they hold as codes."""

    @functools.wraps(num_parameters)
    def counted(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        shown = num_parameters(self, only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        return shown if only_trainable else shown + hidden_parameters(self)

    return counted
