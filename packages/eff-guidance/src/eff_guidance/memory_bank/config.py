"""Settings of the repulsion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from eff_kernels.edit import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class RepulsorConfig(Settings):
    """How representations of different pictures are kept apart.

    The paper's abstract gives the idea, a memory bank and a projection to few dimensions; the numbers are ours, after
    dispersive loss and MoCo.

    Attributes:
        layer: Block whose output is looked at, from 0; "depth/4": the last one of the first quarter.
        dim: Entries of a stored representation.
        queue_size: Representations that the bank holds; at most a quarter of the data set, unless ids are passed.
        temperature: Divides the cosines.
        weight: Of the loss; 0.25 for ImageNet's size, 0.05 for small data.
        warmup_steps: Steps over which the weight rises; "fill": it rises with the filled part of the bank.
        key_encoder: What is stored: "online", what the student made; "ema", what a running average of it makes.
        key_decay: Decay per step of that average.
        pool: "mean" over tokens before the head, or "flatten+linear": a first linear layer over all tokens.
        num_tokens: Tokens of a picture, needed for "flatten+linear".
        reduction: "log_mean" over all pairs, or "mean_log": the mean over pictures of the logarithm of each one's mean.
        gather: Whether the bank gets the representations of all processes.
        with_ids: Whether ids of pictures are passed, so that none repels its own earlier representation.
        t_max: Only pictures at noise levels below it take part, 0 for data and 1 for noise.
        queue_dtype: Of the stored representations.
        chunk: Stored representations that are compared at a time.
        blocks: Patterns of the names of the student's blocks; None: see `find_blocks`.
    """

    tags: ClassVar[Mapping[str, str]] = {"method": "repulsor"}

    layer: int | Literal["depth/4"] = "depth/4"
    dim: int = 128
    queue_size: int = 65_536
    temperature: float = 0.5
    weight: float = 0.25
    warmup_steps: int | Literal["fill"] = "fill"
    key_encoder: Literal["online", "ema"] = "online"
    key_decay: float = 0.999
    pool: Literal["mean", "flatten+linear"] = "mean"
    num_tokens: int | None = None
    reduction: Literal["log_mean", "mean_log"] = "log_mean"
    gather: bool = True
    with_ids: bool = False
    t_max: float = 1.0
    queue_dtype: torch.dtype = torch.bfloat16
    chunk: int = 8192
    blocks: tuple[str, ...] | None = None

    def check(self) -> None:
        """Refuse what is out of range."""
        for name in ("dim", "queue_size", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; use 1 or more")
        if self.layer != "depth/4" and self.layer < 0:
            raise ValueError(f"layer={self.layer}; blocks count from 0")
        if self.warmup_steps != "fill" and self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps}; use 0 or more, or 'fill'")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}; use a positive number")
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight={self.weight}; use 0 or a positive number")
        if not 0 <= self.key_decay < 1:
            raise ValueError(f"key_decay={self.key_decay}; use 0 to below 1")
        if not 0 < self.t_max <= 1:
            raise ValueError(f"t_max={self.t_max}; use a noise level above 0, at most 1")
        if not self.queue_dtype.is_floating_point:
            raise ValueError(f"queue_dtype={self.queue_dtype}; use a floating point type")
        if self.pool == "flatten+linear" and (self.num_tokens is None or self.num_tokens < 1):
            raise ValueError(f"num_tokens={self.num_tokens}; pool='flatten+linear' needs the tokens of a picture")
