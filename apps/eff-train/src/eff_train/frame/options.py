"""The options that every recipe has; a recipe's own config inherits from `TrainConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of a training run. A recipe's config is a frozen dataclass that inherits from this one.

    A subclass that checks its own options does it in ``__post_init__`` and calls ``super().__post_init__()``.

    Attributes:
        steps: Updates of the weights.
        batch_size: Samples in an update, over all processes and parts together.
        accumulate: Parts that each process computes its share of a batch in, one after the other, to save memory.
        lr: Highest learning rate.
        warmup: Updates over which the learning rate rises to its highest value.
        schedule: How the learning rate falls from there to the last update.
        lr_end: Learning rate at the last update, as a share of the highest; for cosine and linear.
        weight_decay: AdamW's decay of the weights, on parameters with two or more dimensions.
        betas: AdamW's decays of the first and second moment, each per update.
        clip: Largest norm of the whole gradient; 0: not limited.
        ema: Decay per update of a running average of the weights, which evaluation, samples and export then use; 0: no
            average.
        precision: Type of the arithmetic in the forward pass (autocast); the weights stay as they are built.
        seed: Start of every random number: weights, order of the data, dropout.
        device: auto (an accelerator where there is one), cpu, cuda or cuda:N.
        threads: CPU threads; 0: PyTorch's choice.
        deterministic: Refuse operations whose result can differ from run to run (may be slower on an accelerator).
        parallel: How several processes share the work: ddp (each holds the model) or fsdp (each holds a share of it).
        log_every: Updates between two lines of metrics; a line holds means over these updates.
        eval_every: Updates between two evaluations; 0: only after the last update.
        save_every: Updates between two checkpoints; 0: only after the last update or when stopped.
        keep: Newest checkpoints that are kept, besides the best one.
        max_minutes: Minutes after which this process saves and ends, to be resumed later; 0: no limit.
        tensorboard: Write TensorBoard's event files into the run folder too.
    """

    steps: int = 1000
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    lr_end: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    deterministic: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 500
    keep: int = 2
    max_minutes: float = 0.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "clip", "threads", "eval_every", "save_every", "max_minutes", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if not 0 <= self.lr_end <= 1:
            raise ValueError(f"lr_end is a share of lr between 0 and 1, got {self.lr_end}")
        for name, value in (("ema", self.ema), ("betas", self.betas[0]), ("betas", self.betas[1])):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {value}")
        if self.warmup > self.steps:
            raise ValueError(f"warmup={self.warmup} is longer than steps={self.steps}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}")
