"""What is trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from eff_vision.unip import LastLayerFPN, StudentConfig, StudentViT
from torch import Tensor, nn

PATCH = 8


class Segmenter(nn.Module):
    """The student with a pyramid and a light decoder: pictures [B, 3, 64, 64] to logits [B, classes, 64, 64].

    Args:
        classes: Number of classes.
        dim: Width of the student.
        depth: Of the student.
        pyramid: "last" or "all": of one layer, or of one for each level.
        features: Whether the student's tokens are mapped to the teacher's width, to be compared with its features.
    """

    def __init__(self, classes: int, *, dim: int, depth: int, pyramid: str, features: bool) -> None:
        super().__init__()
        self.last = pyramid == "last"
        self.student = StudentViT(
            StudentConfig(dim=dim, depth=depth, num_heads=3, last_heads=6, patch_size=PATCH, drop_path=0.05)
        )
        self.features = nn.Linear(dim, 384) if features else None
        self.pyramid = LastLayerFPN(dim)
        self.lateral = nn.ModuleList(nn.Conv2d(dim, 48, 1) for _ in range(4))
        self.head = nn.Sequential(
            nn.Conv2d(48, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, classes, 1)
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """Segment."""
        rows = pictures.size(-2) // PATCH
        states = self.student.states(pictures)
        maps = [x[:, 1:].mT.unflatten(-1, (rows, -1)) for x in states[-4:]]
        levels = self.pyramid(maps[-1] if self.last else maps)
        sides = [x.shape[-2:] for x in levels]
        parts = [
            F.interpolate(f(x), size=sides[0], mode="bilinear", align_corners=False)
            for f, x in zip(self.lateral, levels, strict=True)
        ]
        logits = self.head(torch.stack(parts).sum(0))
        return F.interpolate(logits, size=pictures.shape[-2:], mode="bilinear", align_corners=False)
