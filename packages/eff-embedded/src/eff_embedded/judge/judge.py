"""Judging pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eff_embedded.judge.network import CELL, JudgeNetwork, Scores
from eff_embedded.judge.reading import SURE, Find, Reading, box_of

JUDGE = "collage-judge-v1"


class Judge(nn.Module):
    """Finds objects on pictures.

    Args:
        network: The trained network.
        objects: Names of its objects, in its order.
    """

    def __init__(self, network: JudgeNetwork, objects: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.objects = tuple(objects)

    def scores(self, pictures: Any) -> Scores:
        """Logits of cells and of presence; differentiable with respect to a tensor of pictures."""
        made: Scores = self.network(tensor_of(pictures).to(self.network.decide.weight))
        return made

    @torch.no_grad()
    def forward(self, pictures: Any) -> list[Reading]:
        """Read pictures.

        Args:
            pictures: A PIL picture or a sequence of them, a uint8 array [..., h, w, 3], or a tensor of
                floats from 0 to 1, [..., 3, h, w]. Sides must be multiples of 8; trained on 128.
        """
        scores = self.scores(pictures)
        shares, odds = scores.cells.softmax(1), scores.presence.sigmoid()
        size = CELL * shares.shape[-1]
        return [self._reading(share, sure, size) for share, sure in zip(shares, odds, strict=True)]

    def _reading(self, shares: Tensor, odds: Tensor, size: int) -> Reading:
        found = [
            Find(self.objects[i], float(odds[i]), box_of(shares[i], CELL))
            for i in torch.nonzero(odds > SURE).flatten().tolist()
        ]
        return Reading(finds=tuple(sorted(found, key=lambda find: -find.odds)), size=size)


def load_judge(name: str = JUDGE) -> Judge:
    """The trained judge of this package, in float32 and evaluation mode."""
    from eff_embedded.checkpoints import checkpoint

    found = checkpoint(name)
    about = json.loads((found.folder / "config.json").read_text())
    network = JudgeNetwork(len(about["objects"]), about["width"], about["depth"])
    network.load_state_dict({key: value.float() for key, value in found.weights().items()})
    return Judge(network, about["objects"]).eval()


def tensor_of(pictures: Any) -> Tensor:
    """Pictures as float32 [n, 3, h, w] from 0 to 1.

    Raises:
        TypeError: they are neither PIL pictures nor bytes in an array nor a float tensor.
        ValueError: a side is no multiple of 8.
    """
    if isinstance(pictures, Tensor):
        if not pictures.is_floating_point():
            raise TypeError(f"a tensor of {pictures.dtype}; pass floats from 0 to 1, or a uint8 array [..., h, w, 3]")
        made = pictures.reshape(-1, *pictures.shape[-3:])
    else:
        if not isinstance(pictures, np.ndarray):
            several = pictures if isinstance(pictures, Sequence) else [pictures]
            pictures = np.stack([np.asarray(p.convert("RGB") if hasattr(p, "convert") else p) for p in several])
        if pictures.dtype != np.uint8:
            raise TypeError(f"an array of {pictures.dtype}; pass uint8 [..., h, w, 3]")
        made = torch.from_numpy(pictures.reshape(-1, *pictures.shape[-3:]).copy()).permute(0, 3, 1, 2).float() / 255
    if made.shape[1] != 3 or any(side % CELL for side in made.shape[2:]):
        raise ValueError(f"pictures of {list(made.shape[1:])}; wanted 3 colours and sides that are multiples of {CELL}")
    return made
