"""Object slots that read both views through time, and the picture's features that read the slots (section 3.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from eff_vision.amodal.config import EoRaSConfig
from eff_vision.positions import sine_position


class ObjectAttention(nn.Module):
    """DETR's decoder layers: readers attend to each other, then to what they read (Carion and others, 2020).

    Args:
        config: Width, heads, layers, feed-forward width and dropout.
    """

    def __init__(self, config: EoRaSConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))

    def forward(self, readers: Tensor, reader_code: Tensor, source: Tensor, source_code: Tensor) -> Tensor:
        """Readers [B, R, d] after reading the source [B, S, d]; the codes [R, d] and [S, d] say where each stands."""
        keys = source + source_code
        for layer in self.layers:
            readers = layer(readers, reader_code, keys, source)
        return readers


class _Layer(nn.Module):
    def __init__(self, config: EoRaSConfig) -> None:
        super().__init__()
        d, p = config.d_model, config.dropout
        self.self_attention = nn.MultiheadAttention(d, config.heads, dropout=p, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(d, config.heads, dropout=p, batch_first=True)
        self.feedforward = nn.Sequential(
            nn.Linear(d, config.feedforward), nn.ReLU(), nn.Dropout(p), nn.Linear(config.feedforward, d)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.dropout = nn.Dropout(p)

    def forward(self, readers: Tensor, code: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        at = readers + code
        readers = self.norms[0](readers + self.dropout(self.self_attention(at, at, readers, need_weights=False)[0]))
        found = self.cross_attention(readers + code, keys, values, need_weights=False)[0]
        readers = self.norms[1](readers + self.dropout(found))
        return self.norms[2](readers + self.dropout(self.feedforward(readers)))


class MultiViewFusion(nn.Module):
    """One step through time, with its slots and position codes.

    Args:
        config: Settings of the model.
    """

    slot_code: Tensor
    feature_code: Tensor
    bev_code: Tensor

    def __init__(self, config: EoRaSConfig) -> None:
        super().__init__()
        d = config.d_model
        self.embedding = nn.Parameter(torch.randn(config.slots, d) / math.sqrt(d))
        codes = {
            "slot_code": slot_positions(config.slots, d),
            "feature_code": sine_position(config.grid, config.grid, d),
        }
        self.read_features, self.update = ObjectAttention(config), ObjectAttention(config)
        self.features = nn.Linear(config.features, d)
        self.has_bev = config.bev is not None
        if config.bev is not None:
            self.read_bev, self.bev = ObjectAttention(config), nn.Linear(config.features, d)
            codes["bev_code"] = sine_position(config.bev.cells[2] // 4, config.bev.cells[0] // 4, d)
        for name, code in codes.items():
            if config.learned_positions:
                self.register_parameter(name, nn.Parameter(torch.randn_like(code) / math.sqrt(d)))
            else:
                self.register_buffer(name, code, persistent=False)

    def start(self, batch: int) -> Tensor:
        """Slots before the first frame, [batch, K, d]."""
        return self.embedding.expand(batch, -1, -1)

    def tokens(self, features: Tensor, bev: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Maps [N, C, h, w] as tokens [N, h w, d]."""
        return (
            self.features(features.flatten(2).transpose(1, 2)),
            None if bev is None else self.bev(bev.flatten(2).transpose(1, 2)),
        )

    def step(self, slots: Tensor, features: Tensor, bev: Tensor | None) -> tuple[Tensor, Tensor]:
        """Slots [B, K, d] and the picture's tokens [B, h w, d] after a frame."""
        if bev is not None:
            slots = self.read_bev(slots, self.slot_code, bev, self.bev_code)
        slots = self.read_features(slots, self.slot_code, features, self.feature_code)
        return slots, self.update(features, self.feature_code, slots, self.slot_code)

    def run(self, features: Tensor, bev: Tensor | None, valid: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Go through the frames in order; frames that are not valid leave the slots as they are.

        Args:
            features: Tokens [B, T, h w, d].
            bev: Tokens [B, T, cells, d].
            valid: [B, T], bool.
            slots: At the start, [B, K, d].

        Returns:
            The picture's tokens [B, T, h w, d] and the slots after each frame [B, T, K, d].
        """
        outputs, kept = [], []
        for t in range(features.size(1)):
            after, output = self.step(slots, features[:, t], None if bev is None else bev[:, t])
            slots = torch.where(valid[:, t, None, None], after, slots)
            outputs.append(output)
            kept.append(slots)
        return torch.stack(outputs, 1), torch.stack(kept, 1)


def slot_positions(count: int, dim: int) -> Tensor:
    """Sine codes [count, dim] of a sequence (Vaswani and others, 2017)."""
    angle = torch.arange(count)[:, None] / 10_000 ** (torch.arange(0, dim, 2) / dim)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)
