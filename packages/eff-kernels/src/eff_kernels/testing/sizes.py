"""How much memory models hold."""

from __future__ import annotations

from torch import nn


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of the parameters and buffers of all modules, each storage once."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
