"""Repulsion from the representations of earlier pictures, as a part of training a diffusion transformer."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from eff_kernels.edit import Handle
from torch import Tensor, nn

from eff_guidance.memory_bank.bank import MemoryBank
from eff_guidance.memory_bank.config import RepulsorConfig
from eff_guidance.memory_bank.gather import gather_rows
from eff_guidance.memory_bank.keys import KeyEncoder
from eff_guidance.memory_bank.losses import bank_repulsion_loss
from eff_guidance.training import PhasedLoss, Trigger, find_blocks, unwrapped
from eff_guidance.training.students import block_at, block_width


class RepulsionLoss(NamedTuple):
    """The loss of one batch and what to watch: scalars in float32.

    Attributes:
        repulsion: The loss as it is.
        total: The loss by its weight, warm-up included, to be added to the main loss.
        cosine_states: Mean cosine of different pictures' hidden states (mean over tokens), without gradient. If it
            does not fall while ``cosine_keys`` does, the head alone does the spreading.
        cosine_keys: The same of the stored representations.
    """

    repulsion: Tensor
    total: Tensor
    cosine_states: Tensor
    cosine_keys: Tensor


class RepulsiveAlignment(PhasedLoss):
    """Repulsor: hidden states of different pictures are pushed apart, by a bank of earlier ones (2512.08648).

    Run the student, add ``loss().total`` to the loss, and call `step` after the optimizer's step, which puts the new
    representations into the bank. Train the parameters of this module (the head) along with the student's. Nothing
    is added to the finished model.

    With gradient accumulation call `loss` for each part and `step` once (or after each backward pass, for a bank that
    is filled part by part). With several processes keep this module out of DistributedDataParallel, call
    `sync_gradients` after the backward pass, and let all processes call `step`.

    Args:
        student: The model in training, as it is or inside DistributedDataParallel.
        config: Layer, bank and loss.
        trigger: Ends the phase; see `update`.
        dataset_size: Pictures of the data set: warns if the bank would hold more than a quarter of it and no ids tell
            a picture from others.

    Raises:
        ValueError: the layer does not exist.
    """

    def __init__(
        self,
        student: nn.Module,
        config: RepulsorConfig,
        *,
        trigger: Trigger | None = None,
        dataset_size: int | None = None,
    ) -> None:
        super().__init__(trigger)
        self.config = config
        if dataset_size is not None and 4 * config.queue_size > dataset_size and not config.with_ids:
            warnings.warn(
                f"queue_size={config.queue_size} is more than a quarter of {dataset_size} pictures: pictures will "
                "repel themselves; take a smaller bank, or with_ids=True",
                stacklevel=2,
            )
        inner = unwrapped(student)
        blocks = find_blocks(inner, config.blocks)
        self.layer = max(len(blocks) // 4, 1) - 1 if config.layer == "depth/4" else config.layer
        """Block whose output is looked at, from 0."""
        name, block = block_at(blocks, self.layer, "layer")
        weight = next(p for p in inner.parameters() if p.is_floating_point())
        width = block_width(inner, block)
        tokens = config.num_tokens if config.pool == "flatten+linear" else None
        self.head = make_head(width, config.dim, tokens).to(weight.device)
        self.bank = MemoryBank(config.queue_size, config.dim, config.queue_dtype, with_ids=config.with_ids)
        self.bank.to(weight.device)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=weight.device))
        self.encoder: KeyEncoder | None = None
        if config.key_encoder == "ema":
            self.encoder = KeyEncoder(inner, [n for n, _ in blocks], name, self.head, config.key_decay)
        self._pending: list[tuple[Tensor, Tensor | None]] = []
        self._student: nn.Module | None = None
        self.attach(student)

    steps: Tensor

    def _hook(self, student: nn.Module, handle: Handle) -> None:
        inner = unwrapped(student)
        self.__dict__["_student"] = inner  # an attribute, not a submodule
        self._keep_tokens(handle, block_at(find_blocks(inner, self.config.blocks), self.layer, "layer")[1], "states")
        if self.encoder is not None:

            def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                if self.active:
                    self._seen["call"] = (args, kwargs)

            handle.hook(inner, keep)

    def remove(self) -> None:
        """Take the hooks out of the student."""
        super().remove()
        self.__dict__["_student"] = None

    @property
    def current_weight(self) -> Tensor:
        """The weight at this step, with the warm-up: a scalar."""
        c = self.config
        if c.warmup_steps == "fill":
            return c.weight * self.bank.filled.float() / self.bank.size
        if not c.warmup_steps:
            return torch.full_like(self.steps, c.weight, dtype=torch.float32)
        return c.weight * (self.steps.float() / c.warmup_steps).clamp(max=1)

    def loss(self, timesteps: Tensor | None = None, ids: Tensor | None = None) -> RepulsionLoss:
        """The loss of the student's last forward pass.

        Args:
            timesteps: Noise levels of the batch, [B], 0 for data and 1 for noise; needed if ``t_max`` is below 1.
            ids: Ids of the batch's pictures, int64 [B]; needed with ``with_ids``.

        Raises:
            RuntimeError: the student has not run since the last call, or ran without gradients.
            ValueError: timesteps or ids are missing, not wanted, or of another length.
        """
        if not self.active:
            zero = torch.zeros((), device=self.steps.device)
            return RepulsionLoss(zero, zero, zero, zero)
        c = self.config
        if (ids is None) == c.with_ids:
            raise ValueError("with_ids=True needs ids" if c.with_ids else "ids are for with_ids=True alone")
        if timesteps is None and c.t_max < 1:
            raise ValueError(f"t_max={c.t_max} needs timesteps, from 0 for data to 1 for noise")
        states = self._take("states")
        for name, x in (("timesteps", timesteps), ("ids", ids)):
            if x is not None and x.shape != states.shape[:1]:
                raise ValueError(f"{name} have shape {list(x.shape)}; wanted [{states.shape[0]}]")
        part = None if timesteps is None or c.t_max >= 1 else timesteps.to(states.device) < c.t_max
        ids = None if ids is None else ids.to(states.device)
        z = embed(self.head, states, c.pool)
        found = bank_repulsion_loss(
            z, self.bank.queue, temperature=c.temperature, ids=ids, bank_ids=self.bank.ids, valid=self.bank.valid(),
            take_part=part, reduction=c.reduction, chunk=c.chunk,
        )  # fmt: skip
        with torch.no_grad():
            keys = z.detach() if self.encoder is None else self._encoded(self.encoder)
            kept = slice(None) if part is None else part
            self._pending.append((keys[kept], None if ids is None else ids[kept]))
            cosines = mean_cosine(states.detach().float().mean(1)), mean_cosine(z.detach())
        return RepulsionLoss(found, self.current_weight * found, *cosines)

    def _encoded(self, encoder: KeyEncoder) -> Tensor:
        args, kwargs = self._seen.pop("call")
        return embed(encoder.head, encoder(*args, **kwargs), self.config.pool)

    @torch.no_grad()
    def step(self, group: Any = None) -> None:
        """Put the representations of all `loss` calls since the last step into the bank; after the optimizer's step.

        With ``gather`` and several processes all must call this, and all banks get the same rows in the same order.
        """
        if not self.active:
            return
        c, queue = self.config, self.bank.queue
        keys = torch.cat([queue.new_zeros((0, c.dim), dtype=torch.float32), *(k for k, _ in self._pending)])
        ids: Tensor | None = None
        if c.with_ids:
            none = torch.zeros(0, dtype=torch.int64, device=queue.device)
            ids = torch.cat([none, *(i for _, i in self._pending if i is not None)])
        self._pending.clear()
        if c.gather:
            keys, ids = gather_rows(keys, group), None if ids is None else gather_rows(ids, group)
        # A batch that overflowed in 16 bit, whose update a gradient scaler skips, must not stay in the bank.
        sound = keys.isfinite().all(1)
        self.bank.enqueue(keys[sound], None if ids is None else ids[sound])
        self.steps += 1
        if self.encoder is not None and self._student is not None:
            self.encoder.follow(self._student, self.head)

    def terminate(self) -> None:
        """End the repulsion for good and free the running average of the student."""
        super().terminate()
        self._pending.clear()
        self.encoder = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pending": [], "_student": None}


def make_head(width: int, dim: int, tokens: int | None = None) -> nn.Sequential:
    """Linear, SiLU, Linear, without any norm over the batch; ``tokens`` makes the first layer look at all of them."""
    return nn.Sequential(nn.Linear(width * (tokens or 1), width), nn.SiLU(), nn.Linear(width, dim))


def embed(head: nn.Module, states: Tensor, pool: str) -> Tensor:
    """Unit vectors [B, dim] in float32 of hidden states [B, N, D]."""
    rows = states.float().mean(1) if pool == "mean" else states.flatten(1)
    weight = next(head.parameters())
    if rows.shape[1] != (wanted := int(weight.shape[1])):
        raise ValueError(f"hidden states {list(states.shape)} make {rows.shape[1]} entries; the head takes {wanted}")
    return F.normalize(head(rows.to(weight.dtype)).float(), dim=-1)


def mean_cosine(rows: Tensor) -> Tensor:
    """Mean cosine of different rows of [B, D]; 0 for a single one."""
    unit = F.normalize(rows.float(), dim=1)
    count = unit.shape[0]
    with torch.autocast(rows.device.type, enabled=False):
        return (unit.sum(0).square().sum() - unit.square().sum()) / max(count * (count - 1), 1)
