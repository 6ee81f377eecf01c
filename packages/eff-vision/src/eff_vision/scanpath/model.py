"""The transformer that points at the next object."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eff_vision.scanpath.config import OatConfig
from eff_vision.scanpath.position import DistancePositionEncoding2D

PAD = -100
"""Fills paths of a batch to one length; such steps do not count."""


class OatOutput(NamedTuple):
    """What a forward gives.

    Attributes:
        logits: [B, T + 1, N + 1]: for each prefix of the path the scores of all objects, and last of the end.
        loss: Mean cross-entropy of the next objects and the end, if paths were given.
    """

    logits: Tensor
    loss: Tensor | None


class GridMaxPool(nn.Module):
    """Largest values in a grid of cells that may overlap by a row or column: PyTorch's adaptive pooling.

    For exporters, whose target formats lack it, it is written out cell by cell.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.grid = (rows, columns)

    def forward(self, maps: Tensor) -> Tensor:
        """From [B, C, H, W] to [B, C, rows, columns]."""
        if not torch.compiler.is_exporting():
            return F.adaptive_max_pool2d(maps, self.grid)
        for axis, cells in zip((-2, -1), self.grid, strict=True):
            size = maps.size(axis)
            ends = [(i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)]
            maps = torch.stack([maps.narrow(axis, a, b - a).amax(axis) for a, b in ends], axis)
        return maps


class CropEncoder(nn.Sequential):
    """Crops of objects [..., 3, H, W] to features: two convolutions, pooled to 9 x 5 whatever the size of the crops."""

    def __init__(self, dim: int) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            GridMaxPool(9, 5),
            nn.Flatten(),
            nn.Linear(32 * 45, dim),
        )


class ObjectScanpathTransformer(nn.Module):
    """Predicts the next object that is looked at, among any number of objects.

    Args:
        config: Settings.
    """

    def __init__(self, config: OatConfig) -> None:
        super().__init__()
        c = self.config = config
        half = c.d_model // 2
        self.appearance: nn.Module = CropEncoder(half) if c.feature_dim is None else nn.Linear(c.feature_dim, half)
        self.place = (
            None
            if c.position is None
            else DistancePositionEncoding2D(
                half, mode="grid" if c.position == "gaussian" else "sine", sigma=c.sigma, max_grid=c.max_grid
            )
        )
        self.is_target = nn.Parameter(torch.randn(2, c.d_model) * 0.02)  # added to tokens: another object, the target
        self.start = nn.Parameter(torch.randn(half) * 0.02)
        shape: dict[str, Any] = {
            "d_model": c.d_model,
            "nhead": c.num_heads,
            "dim_feedforward": c.d_ff,
            "dropout": c.dropout,
        }
        common = {**shape, "batch_first": True, "norm_first": c.pre_norm}
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**common), c.enc_layers, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**common), c.dec_layers)
        self.query, self.key = (nn.Linear(c.d_model, c.d_model * c.pointer_heads) for _ in range(2))
        self.mix = nn.Linear(c.pointer_heads, 1)
        self.inhibition = nn.Parameter(torch.zeros(())) if c.inhibition else None
        self.dropout = nn.Dropout(c.dropout)
        for p in self.parameters():
            if p.ndim > 1 and p is not self.is_target:
                nn.init.xavier_uniform_(p)

    def forward(
        self,
        *,
        positions: Tensor,
        target: Tensor,
        fixations: Tensor,
        images: Tensor | None = None,
        features: Tensor | None = None,
        object_mask: Tensor | None = None,
        looks: Tensor | None = None,
    ) -> OatOutput:
        """Score the next object after each prefix of a path.

        Args:
            positions: Row and column of each object, [B, N, 2].
            target: Index of the object that is searched for, int64 [B].
            fixations: Indices of the objects looked at, int64 [B, T], filled with `PAD`.
            images: Crops [B, N, 3, H, W] in [0, 1]; or
            features: features [B, N, feature_dim].
            looks: Of each object its place among ``images`` [K, 3, H, W], int64 [B, N]: pictures that come again and
                again are then read once.
            object_mask: bool [B, N], False for objects that only fill the batch.

        Raises:
            ValueError: not exactly one of images and features, or a fixation or target on an object that is not there.
        """
        memory, tokens, mask = self._encode(positions, target, images, features, object_mask, looks)
        self._check(fixations, target, mask)
        logits = self._decode(memory, tokens, mask, positions, target, fixations)
        return OatOutput(logits, self._loss(logits, fixations))

    def scores(
        self,
        *,
        positions: Tensor,
        target: Tensor,
        fixations: Tensor,
        images: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """The logits of `forward` for full batches, without a look at the values: what a compiler can follow."""
        memory, tokens, mask = self._encode(positions, target, images, features, None)
        return self._decode(memory, tokens, mask, positions, target, fixations)

    def _encode(
        self,
        positions: Tensor,
        target: Tensor,
        images: Tensor | None,
        features: Tensor | None,
        object_mask: Tensor | None,
        looks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encoder outputs of objects and target token [B, N + 1, d], object tokens [B, N, d], mask [B, N]."""
        if (images is None) == (features is None):
            raise ValueError("give exactly one of images and features")
        if (features is None) != (self.config.feature_dim is None):
            raise ValueError("the model reads features where feature_dim is set, else images")
        if looks is not None and (images is None or images.ndim != 4):
            raise ValueError("looks are indices into images [K, 3, H, W], so give images of that shape")
        if images is not None and looks is not None:
            seen = self.appearance(images)[looks]
        elif images is not None:
            seen = self.appearance(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        else:
            seen = self.appearance(features)
        batch, n = seen.shape[:2]
        mask = torch.ones(batch, n, dtype=torch.bool, device=seen.device) if object_mask is None else object_mask
        if self.config.centre_appearance:
            seen = _centred(seen, mask)
        tokens = torch.cat((seen, self._places(positions, seen)), -1)
        chosen = seen[torch.arange(batch), target]
        where = (
            self._places(positions, seen)[torch.arange(batch), target]
            if self.config.reveal_target_position
            else torch.zeros_like(chosen)
        )
        target_token = torch.cat((chosen, where), -1) + self.is_target[1]
        whole = torch.cat((tokens + self.is_target[0], target_token[:, None]), 1)
        hidden = torch.cat((~mask, torch.zeros(batch, 1, dtype=torch.bool, device=mask.device)), 1)
        return self.encoder(self.dropout(whole), src_key_padding_mask=hidden), tokens, mask

    def _decode(
        self, memory: Tensor, tokens: Tensor, mask: Tensor, positions: Tensor, target: Tensor, fixations: Tensor
    ) -> Tensor:
        batch, steps = fixations.shape
        d = self.config.d_model
        safe = fixations.clamp_min(0)
        looked = tokens.gather(1, safe[..., None].expand(-1, -1, d))
        flag = (fixations == target[:, None]).long()  # whoever searches knows the target when looking at it
        looked = looked + self.is_target[flag]
        start = torch.cat((self.start, torch.zeros_like(self.start))).expand(batch, 1, -1)
        path = torch.cat((start, looked), 1) + _time_code(steps + 1, d).to(looked)
        causal = torch.ones(steps + 1, steps + 1, dtype=torch.bool, device=path.device).triu(1)
        hidden = torch.cat((~mask, torch.zeros(batch, 1, dtype=torch.bool, device=mask.device)), 1)
        states = self.decoder(
            self.dropout(path), memory, tgt_mask=causal, memory_key_padding_mask=hidden, tgt_is_causal=False
        )  # the mask says it; without the flag PyTorch would look at the mask's values, which no exporter follows
        q, k = (f(x).unflatten(-1, (-1, d)) for f, x in ((self.query, states), (self.key, memory)))
        scores = torch.einsum("bthd,bnhd->btnh", q, k) / d**0.5
        logits = self.mix(scores).squeeze(-1)
        if self.inhibition is not None:
            logits = logits - self.inhibition * _visited(fixations, logits.size(-1))
        return logits.masked_fill(hidden[:, None], -torch.inf)

    def _places(self, positions: Tensor, like: Tensor) -> Tensor:
        if self.place is None:
            return torch.zeros_like(like)
        return self.place(positions).to(like)

    def _loss(self, logits: Tensor, fixations: Tensor) -> Tensor:
        batch, n = len(fixations), logits.size(-1) - 1
        wanted = torch.cat((fixations, fixations.new_full((batch, 1), PAD)), 1)
        ends = (fixations != PAD).sum(1)
        wanted[torch.arange(batch), ends] = n  # the end comes after the last fixation
        if self.config.use_pad_class:
            logits = torch.cat((logits, torch.zeros_like(logits[..., :1])), -1)
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=PAD)

    def _check(self, fixations: Tensor, target: Tensor, mask: Tensor) -> None:
        batch, n = mask.shape
        if fixations.ndim != 2 or len(fixations) != batch or target.shape != (batch,):
            raise ValueError(
                f"wanted fixations [{batch}, T] and target [{batch}], got {list(fixations.shape)}, {list(target.shape)}"
            )
        real = fixations != PAD
        if bool((real.long().diff(dim=1) > 0).any()):
            raise ValueError("PAD must fill the end of a path, not its middle")
        if bool((real & ((fixations < 0) | (fixations >= n))).any()):
            raise ValueError(f"fixations must be object indices from 0 to {n - 1}, or {PAD} to fill")
        there = mask.gather(1, fixations.clamp(0, n - 1))
        if bool((real & ~there).any()) or not bool(mask[torch.arange(batch), target].all()):
            raise ValueError("a fixation or the target is on an object that object_mask leaves out")

    @torch.no_grad()
    def generate(
        self,
        *,
        positions: Tensor,
        target: Tensor,
        images: Tensor | None = None,
        features: Tensor | None = None,
        object_mask: Tensor | None = None,
        looks: Tensor | None = None,
        max_len: int = 20,
        num_samples: int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Paths of at least one object: greedy, or ``num_samples`` drawn for each scene.

        Returns:
            int64 [B, S, max_len] filled with `PAD`, and lengths [B, S]; S is 1 for greedy paths.
        """
        if max_len < 1 or not temperature > 0:
            raise ValueError(f"wanted max_len >= 1 and temperature > 0, got {max_len} and {temperature}")
        samples = num_samples or 1
        memory, tokens, mask = self._encode(positions, target, images, features, object_mask, looks)
        memory, tokens, mask, positions, target = (
            x.repeat_interleave(samples, 0) for x in (memory, tokens, mask, positions, target)
        )
        paths = torch.full((len(target), max_len), PAD, device=target.device)
        running = torch.ones(len(target), dtype=torch.bool, device=target.device)
        end = mask.size(1)
        for step in range(max_len):
            logits = self._decode(memory, tokens, mask, positions, target, paths[:, :step])[:, -1]
            if step == 0:
                logits[:, end] = -torch.inf
            if num_samples is None:
                chosen = logits.argmax(1)
            else:
                chosen = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator).squeeze(1)
            running &= chosen != end
            paths[running, step] = chosen[running]
            if not bool(running.any()):
                break
        paths = paths.unflatten(0, (-1, samples))
        return paths, (paths != PAD).sum(-1)


def _centred(seen: Tensor, mask: Tensor) -> Tensor:
    """Appearances [B, N, C] without the mean of each scene's objects, brought to one length."""
    there = mask[..., None].to(seen)
    mean = (seen * there).sum(1, keepdim=True) / there.sum(1, keepdim=True)
    return F.layer_norm(seen - mean, seen.shape[-1:])


def _visited(fixations: Tensor, tokens: int) -> Tensor:
    """Whether each token was looked at before each step, float [B, T + 1, N + 1]."""
    seen = F.one_hot(fixations.clamp_min(0), tokens) * (fixations != PAD)[..., None]
    return F.pad(seen.cumsum(1).clamp_max(1), (0, 0, 1, 0)).float()


def _time_code(steps: int, dim: int) -> Tensor:
    place = torch.arange(steps)[:, None]
    angle = place * 10_000.0 ** (-torch.arange(0, dim, 2) / dim)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)
