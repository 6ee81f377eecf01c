"""Heads: poses from the camera tokens, dense maps from the patches. They run in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff_vision.multiview.blocks import Block, Mlp
from eff_vision.multiview.config import MultiViewConfig
from eff_vision.residual import ResidualUnit


class CameraHead(nn.Module):
    """Poses by repeated refinement (VGGT, section 3.3): nine numbers as of `eff_vision.geometry.encode_pose`.

    The quaternion begins at the identity.

    Args:
        config: Settings.
    """

    start: Tensor

    def __init__(self, config: MultiViewConfig) -> None:
        super().__init__()
        c, d = config, 2 * config.dim
        self.steps, self.fov = c.camera_steps, c.fov_activation
        self.token_norm, self.trunk_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.empty_pose = nn.Parameter(torch.zeros(9))
        self.embed_pose = nn.Linear(9, d)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 3 * d))
        self.adaln_norm = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.trunk = nn.ModuleList(
            Block(d, c.heads, qk_norm=False, layer_scale=c.layer_scale) for _ in range(c.camera_depth)
        )
        self.pose_branch = Mlp(d, d // 2, 9)
        self.register_buffer("start", torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 1, 1]), persistent=False)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Pose codes [B, S, 9] after each refinement, from camera tokens [B, S, 2 dim]."""
        tokens = self.token_norm(tokens)
        pose, found = self.start.expand(*tokens.shape[:2], 9), []
        for step in range(self.steps):
            given = self.empty_pose.expand_as(pose) if step == 0 else pose.detach()
            shift, scale, gate = self.modulation(self.embed_pose(given)).chunk(3, -1)
            x = tokens + gate * (self.adaln_norm(tokens) * (1 + scale) + shift)
            for block in self.trunk:
                x = block(x)
            pose = pose + self.pose_branch(self.trunk_norm(x))
            fov = F.softplus(pose[..., 7:]) if self.fov == "softplus" else F.relu(pose[..., 7:])
            found.append(torch.cat((pose[..., :7], fov), -1))
        return found


class DenseHead(nn.Module):
    """A map and its confidence for each view.

    Args:
        config: Settings.
        kind: "depth" gives one channel through the exponential, "points" three through the inverse logarithm
            ``sign(y) (exp |y| - 1)``.
    """

    def __init__(self, config: MultiViewConfig, kind: Literal["depth", "points"]) -> None:
        super().__init__()
        self.kind, self.channels = kind, 1 if kind == "depth" else 3
        self.net: nn.Module = (Shuffle if config.head == "shuffle" else Pyramid)(config, self.channels + 1)

    def forward(
        self, tokens: Mapping[int, Tensor], images: Tensor, special: int, frames: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map [B, S, H, W, channels] and confidence >= 1 [B, S, H, W].

        Args:
            tokens: Of `Aggregator`.
            images: [B, S, 3, H, W].
            special: Tokens in front of the patches.
            frames: Views at a time, to bound the memory; all if None.
        """
        batch, views = images.shape[:2]
        flat = {i: t[:, :, special:].flatten(0, 1) for i, t in tokens.items()}
        pictures, count = images.flatten(0, 1), batch * views
        step = count if frames is None else frames
        parts = [
            self.net({i: t[s : s + step] for i, t in flat.items()}, pictures[s : s + step])
            for s in range(0, count, step)
        ]
        y = torch.cat(parts).unflatten(0, (batch, views)).movedim(2, -1)
        values, confidence = y[..., :-1], 1 + y[..., -1].exp()
        if self.kind == "depth":
            return values.exp(), confidence
        return values.sign() * values.abs().expm1(), confidence


class Shuffle(nn.Module):
    """Two pixel shuffles with the picture as a second input: for small patches."""

    def __init__(self, config: MultiViewConfig, channels: int) -> None:
        super().__init__()
        d, w, rest = 2 * config.dim, config.head_dim, config.patch_size // 2
        self.taps, self.patch = config.taps, config.patch_size
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in config.taps)
        self.projections = nn.ModuleList(nn.Linear(d, w * 4) for _ in config.taps)
        self.rest = rest
        self.first = nn.Conv2d(w, w, 3, padding=1)
        self.up = nn.Conv2d(w, w * rest * rest // 2, 3, padding=1)
        self.picture = nn.Conv2d(3, w // 2, 3, padding=1)
        self.second = nn.Conv2d(w // 2 + w // 2, w, 3, padding=1)
        self.last = nn.Conv2d(w, channels, 3, padding=1)

    def forward(self, tokens: Mapping[int, Tensor], pictures: Tensor) -> Tensor:
        """[N, channels, H, W]."""
        grid = (pictures.size(-2) // self.patch, pictures.size(-1) // self.patch)
        x = torch.stack(
            [
                projection(norm(tokens[tap])).mT.unflatten(-1, grid)
                for tap, norm, projection in zip(self.taps, self.norms, self.projections, strict=True)
            ]
        ).sum(0)
        x = F.gelu(self.first(F.pixel_shuffle(x, 2)))
        x = F.gelu(F.pixel_shuffle(self.up(x), self.rest))
        return self.last(F.gelu(self.second(torch.cat((x, F.gelu(self.picture(pictures))), 1))))


class Pyramid(nn.Module):
    """DPT's reassembling and fusing of four maps (Ranftl and others, 2021)."""

    def __init__(self, config: MultiViewConfig, channels: int) -> None:
        super().__init__()
        d, w = 2 * config.dim, config.head_dim
        self.taps, self.patch = config.taps, config.patch_size
        widths = (w, 2 * w, 4 * w, 4 * w)
        self.norm = nn.LayerNorm(d)
        self.projects = nn.ModuleList(nn.Conv2d(d, width, 1) for width in widths)
        self.resizes = nn.ModuleList(
            (
                nn.ConvTranspose2d(widths[0], widths[0], 4, 4),
                nn.ConvTranspose2d(widths[1], widths[1], 2, 2),
                nn.Identity(),
                nn.Conv2d(widths[3], widths[3], 3, 2, 1),
            )
        )
        self.levels = nn.ModuleList(nn.Conv2d(width, w, 3, padding=1, bias=False) for width in widths)
        self.units = nn.ModuleList(ResidualUnit(lambda: nn.Conv2d(w, w, 3, padding=1)) for _ in range(8))
        self.first = nn.Conv2d(w, w // 2, 3, padding=1)
        self.second, self.last = nn.Conv2d(w // 2, 32, 3, padding=1), nn.Conv2d(32, channels, 1)

    def forward(self, tokens: Mapping[int, Tensor], pictures: Tensor) -> Tensor:
        """[N, channels, H, W]."""
        height, width = pictures.shape[-2:]
        grid = (height // self.patch, width // self.patch)
        maps = []
        for i, tap in enumerate(self.taps):
            x = self.projects[i](self.norm(tokens[tap]).mT.unflatten(-1, grid))
            maps.append(self.levels[i](self.resizes[i](x)))
        x = self.units[7](self.units[6](maps[3]))
        for i in (2, 1, 0):
            x = F.interpolate(x, size=maps[i].shape[-2:], mode="bilinear", align_corners=False)
            x = self.units[2 * i + 1](x + self.units[2 * i](maps[i]))
        x = F.interpolate(self.first(x), size=(height, width), mode="bilinear", align_corners=False)
        return self.last(F.relu(self.second(x)))
