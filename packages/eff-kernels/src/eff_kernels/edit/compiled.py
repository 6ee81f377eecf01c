"""What compiled code must not look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """The function as it is; inside of torch.compile, one that compiled code calls and does not trace.

    For what depends on contents, lengths or threads. Ask for it where it is called: as a decorator
    ``torch.compiler.disable`` would import the compiler with the package.
    """
    if not torch.compiler.is_compiling():
        return function
    found: F = torch.compiler.disable(function)
    return found
