"""PD-BridgeNet: a backbone, two streams, six tasks, and the bridges between them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from eff_vision.geometry.sphere import check_erp
from eff_vision.panorama.bridge import GradientTruncatedBridge
from eff_vision.panorama.config import AUXILIARY, CHANNELS, INVARIANT, MAIN, VARIANT, PDBridgeConfig, stream_of
from eff_vision.panorama.decoder import TaskDecoder
from eff_vision.panorama.layers import ChannelNorm, PanoConv2d, resize_panorama, zero_conv
from eff_vision.panorama.streams import StreamSplit

TASKS = MAIN + AUXILIARY
STREAMS = {"invariant": INVARIANT, "variant": VARIANT}
_TAPS = 4


class PanoOutput(NamedTuple):
    """What `PDBridgeNet` gives, all at the size of the panorama.

    Attributes:
        main: "semseg" logits [B, classes, H, W], "depth" (distance along the ray) [B, 1, H, W], and "normals" of
            any length [B, 3, H, W].
        intermediate: All six tasks as predicted in front of the bridge.
    """

    main: dict[str, Tensor]
    intermediate: dict[str, Tensor]


class Injection(nn.Module):
    """Adds what bridge and task say to one map of the backbone; it begins as the identity.

    The paper shares the bridge's projection between the tasks of a stream; here each task has its own.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.from_bridge, self.from_feature = zero_conv(dim, channels), zero_conv(dim, channels)
        self.refine = nn.Sequential(
            PanoConv2d(channels, channels, 3), ChannelNorm(channels), nn.GELU(), zero_conv(channels, channels)
        )

    def forward(self, tap: Tensor, bridged: Tensor, feature: Tensor) -> Tensor:
        """A map of the shape of ``tap``."""
        base = tap + self.from_bridge(bridged)
        return base + self.from_feature(feature) + self.refine(base)


class PDBridgeNet(nn.Module):
    """Segmentation, depth and normals of panoramas.

    At its start it gives what its decoders give on the maps of the backbone: all that comes between begins at zero.

    Args:
        backbone: Takes panoramas to four maps [B, channels, h, w] of one size, such as `BackboneTaps`.
        config: Settings.
    """

    def __init__(self, backbone: nn.Module, config: PDBridgeConfig) -> None:
        super().__init__()
        c = self.config = config
        self.backbone = backbone
        self.split = StreamSplit(c.channels, _TAPS, c.blocks, c.streams)
        self.aggregate = nn.ModuleDict(
            {
                stream: nn.Sequential(nn.Conv2d(_TAPS * c.channels, c.dim, 1), ChannelNorm(c.dim), nn.GELU())
                for stream in STREAMS
            }
        )
        self.features = nn.ModuleDict({task: _task_features(c.dim) for task in TASKS})
        self.predict = nn.ModuleDict(
            {task: nn.Conv2d(c.dim, c.classes if task == "semseg" else CHANNELS[task], 1) for task in TASKS}
        )
        self.bridges = nn.ModuleDict(
            {
                stream: GradientTruncatedBridge(
                    TASKS, own, c.dim, heads=c.heads, mlp_ratio=c.mlp_ratio, truncate=c.truncate
                )
                for stream, own in STREAMS.items()
            }
        )
        self.inject = nn.ModuleDict(
            {task: nn.ModuleList(Injection(c.channels, c.dim) for _ in range(_TAPS)) for task in MAIN}
        )
        self.decoders = nn.ModuleDict({task: TaskDecoder(task, c.channels, c.dim, c.classes) for task in MAIN})

    def forward(self, panoramas: Tensor) -> PanoOutput:
        """Predict all tasks of panoramas [B, 3, H, 2H].

        Raises:
            ValueError: they are not twice as wide as high, or the backbone gave maps of other shapes.
        """
        if panoramas.dim() != 4 or panoramas.size(1) != 3:
            raise ValueError(f"panoramas must be [B, 3, H, 2H], got {list(panoramas.shape)}")
        height, width = panoramas.shape[-2:]
        check_erp(height, width)
        taps = list(self.backbone(panoramas))
        if len(taps) != _TAPS or any(t.shape[:2] != (len(panoramas), self.config.channels) for t in taps):
            shapes = [list(t.shape) for t in taps]
            raise ValueError(f"the backbone gave maps {shapes}; wanted {_TAPS} with {self.config.channels} channels")
        streams = self.split(taps)
        aggregates = {name: layer(torch.cat(streams[name], 1)) for name, layer in self.aggregate.items()}
        features = {task: self.features[task](aggregates[stream_of(task)]) for task in TASKS}
        intermediate = {
            task: resize_panorama(self.predict[task](feature), height, width) for task, feature in features.items()
        }
        bridged = {name: bridge(aggregates[name], features) for name, bridge in self.bridges.items()}
        main = {}
        for task in MAIN:
            stream = stream_of(task)
            maps = [
                inject(tap, bridged[stream], features[task])
                for inject, tap in zip(self.inject[task].children(), streams[stream], strict=True)
            ]
            main[task] = self.decoders[task](maps, height, width)
        return PanoOutput(main, intermediate)


def _task_features(dim: int) -> nn.Sequential:
    return nn.Sequential(
        PanoConv2d(dim, dim, 3), ChannelNorm(dim), nn.GELU(), nn.Conv2d(dim, dim, 1), ChannelNorm(dim), nn.GELU()
    )
