"""Checkpoints that eff trained itself: small, in 16 bit, each with the record of its training, shipped in the wheel.

A checkpoint is a folder next to this file, named for its model and version. It is never overwritten: a better training
gets the next version's name, and what was measured with the old one can be measured again.
"""

from eff_embedded.checkpoints.store import (
    MAX_BYTES,
    RECORD_KEYS,
    Checkpoint,
    checkpoint,
    checkpoints,
    save_checkpoint,
)

__all__ = ["MAX_BYTES", "RECORD_KEYS", "Checkpoint", "checkpoint", "checkpoints", "save_checkpoint"]
