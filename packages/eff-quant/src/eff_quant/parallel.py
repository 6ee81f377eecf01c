"""Quantised layers under `torch.nn.parallel.DistributedDataParallel`."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def keep_codes_local_(model: nn.Module) -> list[str]:
    """Keep `DistributedDataParallel` from sending codes and scales between processes.

    They are buffers, which it sends from the first process to all others when it is made and before every forward; but
    each process has loaded the same ones, and nothing changes them. Some backends cannot send FP8 at all ("Invalid
    scalar type" of gloo). FSDP2 sends parameters alone and needs none of this.

    Args:
        model: The very module that is given to `DistributedDataParallel`, with its adapters.

    Returns:
        The names of the buffers.
    """
    names = [
        buffer
        for name, module in model.named_modules()
        if getattr(module, "num_hidden_parameters", 0)
        for buffer, _ in module.named_buffers(prefix=name)
    ]
    before = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*dict.fromkeys([*before, *names])])
    return names
