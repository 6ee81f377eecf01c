"""One process or several under torchrun: who computes which samples, DDP or FSDP2 around the model, whole tensors."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eff_train.frame.recipe import Recipe

# The other processes wait while one evaluates; torchrun ends them all when one dies.
PATIENCE = timedelta(hours=12)


class Loss(nn.Module):
    """A recipe's loss as a module, so that DDP and FSDP see its forward pass and the recipe sees its own model."""

    def __init__(self, recipe: Recipe[Any], model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._recipe = recipe

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Loss and metrics of a batch."""
        loss, metrics = self._recipe.loss(self.model, batch)
        return loss, dict(metrics)


@dataclass(frozen=True)
class Workers:
    """The processes that train together. ``count`` 1 needs no process group."""

    rank: int
    count: int
    device: torch.device
    parallel: str = "ddp"

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether each process holds a share of the parameters only."""
        return self.count > 1 and self.parallel == "fsdp"

    def share(self, samples: range) -> range:
        """This process's part of the samples of a batch.

        Raises:
            ValueError: the batch cannot be shared out evenly.
        """
        if len(samples) % self.count:
            raise ValueError(f"batch_size={len(samples)} cannot be shared evenly by {self.count} processes")
        each = len(samples) // self.count
        return samples[self.rank * each : (self.rank + 1) * each]

    def wrap(self, loss: Loss, units: Sequence[nn.Module], *, unused: bool = False) -> nn.Module:
        """Put DDP or FSDP2 around the loss; parameters change their class in place for the latter.

        Args:
            loss: The loss with the model in it.
            units: What FSDP2 gathers together.
            unused: Whether some parameters may take no part in a batch; DDP then looks for them.
        """
        if self.count == 1:
            return loss
        if not self.sharded:
            ids = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(loss, device_ids=ids, find_unused_parameters=unused)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.count,))
        for unit in units:
            fully_shard(unit, mesh=mesh)
        fully_shard(loss, mesh=mesh)
        return loss

    def hold_gradients(self, wrapped: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Context of the backward pass of a part: gradients travel between processes after the last part only."""
        if self.count == 1:
            return nullcontext()
        if self.sharded:
            wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
            return nullcontext()
        return nullcontext() if last else wrapped.no_sync()  # type: ignore[operator]

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes."""
        if self.count == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return summed.tolist()

    def collect(self, value: Any) -> list[Any]:
        """The values of all processes, in order of rank; on the main process, elsewhere an empty list."""
        if self.count == 1:
            return [value]
        found: list[Any] | None = [None] * self.count if self.main else None
        dist.gather_object(value, found)
        return found or []

    def tell(self, value: Any) -> Any:
        """The main process's value, everywhere."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def whole(tensor: Tensor) -> Tensor:
    """A CPU copy of the whole of a tensor that may be shared out. All processes must call this."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().to("cpu", copy=True).contiguous()


def laid_out_as(value: Tensor, like: Tensor) -> Tensor:
    """``value`` on the device of ``like``, and shared out as it is."""
    if hasattr(like, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]
    return value.to(like.device)


def pick_device(name: str) -> torch.device:
    """The device of an option: ``auto`` takes this process's accelerator where there is one."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


@contextmanager
def workers(device: str = "auto", parallel: str = "ddp") -> Iterator[Workers]:
    """The processes that torchrun started (its environment variables say how many), or this one alone.

    A process can enter this once.
    """
    chosen = pick_device(device)
    count = int(os.environ.get("WORLD_SIZE", 1))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if count == 1:
        yield Workers(0, 1, chosen, parallel)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Workers(dist.get_rank(), count, chosen, parallel)
    finally:
        # A wrapped model that is still there, in a circle, keeps the group's threads alive beyond its end. One of them
        # that wants the interpreter while it shuts down ends the process with "terminate called".
        gc.collect()
        dist.destroy_process_group()
        gc.collect()
