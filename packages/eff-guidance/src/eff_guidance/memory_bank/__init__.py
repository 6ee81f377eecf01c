"""Repulsor: a memory bank of representations that those of new pictures are pushed away from (2512.08648)."""

from eff_guidance.memory_bank.bank import MemoryBank
from eff_guidance.memory_bank.config import RepulsorConfig
from eff_guidance.memory_bank.losses import bank_repulsion_loss, dispersive_loss
from eff_guidance.memory_bank.repulsion import RepulsionLoss, RepulsiveAlignment, mean_cosine

__all__ = [
    "MemoryBank",
    "RepulsionLoss",
    "RepulsiveAlignment",
    "RepulsorConfig",
    "bank_repulsion_loss",
    "dispersive_loss",
    "mean_cosine",
]
