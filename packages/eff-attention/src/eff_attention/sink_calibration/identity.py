"""A short name for the weights of a model, to notice lists of heads that were made for another one."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

_SAMPLES = 64  # values of each parameter


def model_hash(model: nn.Module) -> str:
    """Sixteen hexadecimal digits from names, shapes and some values of all parameters.

    Values are rounded to bfloat16 first, so that a model that was cast to it has the name that it had in float32.
    """
    digest = hashlib.sha256()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            digest.update(f"{name}{list(parameter.shape)}".encode())
            flat = parameter.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // _SAMPLES)].to(torch.bfloat16).cpu().contiguous()
            digest.update(some.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
