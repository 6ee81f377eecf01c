"""A label for every pixel of a scene."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from eff_vision.specvit.patches import HsiPatches


@torch.inference_mode()
def predict_map(model: nn.Module, patches: HsiPatches, *, batch_size: int = 512) -> NDArray[np.int64]:
    """Classes [H, W], counted from 1 as in the labels, of all pixels of the scene that ``patches`` cuts from."""
    was_training = model.training
    model.eval()
    half = patches.patch // 2
    height, width = patches.values.size(1) - 2 * half, patches.values.size(2) - 2 * half
    places = np.argwhere(np.ones((height, width), bool))
    try:
        found = [
            model(patches.cut(places[i : i + batch_size])).argmax(1) + 1 for i in range(0, len(places), batch_size)
        ]
    finally:
        model.train(was_training)
    return torch.cat(found).numpy().reshape(height, width)
