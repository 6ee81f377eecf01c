"""The encoder: one decoder layer of cross-attention from learnt queries to patches, and a masked linear read-out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eff_vision.brain_encoder.config import RoiQueryConfig
from eff_vision.brain_encoder.rois import RoiMasks
from eff_vision.positions import sine_position


class EncoderOutput(NamedTuple):
    """What the encoder gives.

    Attributes:
        prediction: For each set of targets (such as "lh" and "rh") its responses [B, V].
        tokens: Pooled vector of each query, [B, R, d_model]; the sets' queries one after the other.
        attention: [B, heads, R, S] if it was asked for.
    """

    prediction: dict[str, Tensor]
    tokens: Tensor
    attention: Tensor | None


class CrossAttention(nn.Module):
    """Attention from queries [R, d] to patches, with keys and values of different sources."""

    def __init__(self, dim: int, num_heads: int, *, value_projection: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim) if value_projection else nn.Identity()
        self.out = nn.Linear(dim, dim)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attend: query [B, R, d], key and value [B, S, d], mask bool [B, S] of real patches."""
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in (self.query(query), self.key(key), self.value(value))
        )
        keep = None if mask is None else mask[:, None, None, :]
        weights = None
        if need_weights:
            scores = q @ k.mT / q.size(-1) ** 0.5
            weights = (scores if keep is None else scores.masked_fill(~keep, -torch.inf)).softmax(-1)
            pooled = weights @ v
        else:
            pooled = F.scaled_dot_product_attention(q, k, v, keep)
        return self.out(pooled.transpose(1, 2).flatten(2)), weights


class RoiQueryEncoder(nn.Module):
    """Predict responses of brain regions from patch features (section 3).

    Args:
        config: Settings.
        rois: Regions of each set of targets, such as ``{"lh": ..., "rh": ...}``; each region gets a query.

    Raises:
        ValueError: there are no targets.
    """

    def __init__(self, config: RoiQueryConfig, rois: Mapping[str, RoiMasks]) -> None:
        super().__init__()
        if not rois:
            raise ValueError("rois is empty: there is nothing to predict")
        self.config = config
        self.names = {name: roi.names for name, roi in rois.items()}
        d = config.d_model
        self.project = nn.Identity() if config.feature_dim == d else nn.Linear(config.feature_dim, d)
        self.queries = nn.Parameter(torch.randn(sum(len(r.names) for r in rois.values()), d))
        self.query_norm = nn.LayerNorm(d)
        self.attention = CrossAttention(d, config.num_heads, value_projection=config.value_projection)
        self.dropout = nn.Dropout(config.dropout)
        self.ff_norm = nn.LayerNorm(d) if config.d_ff else None
        self.ff = (
            nn.Sequential(nn.Linear(d, config.d_ff), nn.ReLU(), self.dropout, nn.Linear(config.d_ff, d))
            if config.d_ff
            else None
        )
        self.norm = nn.LayerNorm(d)
        if config.position == "learned":
            self.rows, self.columns = (nn.Parameter(torch.rand(config.max_grid, d // 2)) for _ in range(2))
        self.readout = nn.ModuleDict({name: nn.Linear(d, roi.num_targets) for name, roi in rois.items()})
        self._counts: dict[str, list[int]] = {}
        for name, roi in rois.items():
            self.register_buffer(f"mask_{name}", roi.masks)
            self.register_buffer(f"members_{name}", torch.empty(0, dtype=torch.int64), persistent=False)
        self._index()

    def _index(self) -> None:
        """Keep the vertices of each region of the masks, one region after the other."""
        for name in self.names:
            mask: Tensor = getattr(self, f"mask_{name}")
            self._counts[name] = mask.sum(1).tolist()
            setattr(self, f"members_{name}", mask.nonzero()[:, 1])

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._index()  # the masks may be those of other regions

    def forward(
        self,
        features: Tensor,
        grid: tuple[int, int],
        *,
        patch_mask: Tensor | None = None,
        return_attention: bool = False,
    ) -> EncoderOutput:
        """Predict.

        Args:
            features: Patch features [B, S, feature_dim], without class and register tokens.
            grid: Rows and columns of the patches.
            patch_mask: bool [B, S], False for padded patches.
            return_attention: Also give the attention, computed explicitly.

        Raises:
            ValueError: the grid does not hold S patches, or a picture has no real patch.
        """
        self._check(features, grid, patch_mask)
        value = self.project(features)
        place = self._position(grid, value)
        key = {"both": value if place is None else value + place, "content": value, "position": place}[
            self.config.key_source
        ]
        assert key is not None
        # The state before the layer is zero, and the norm of zero is the norm's bias.
        query = (self.query_norm.bias + self.queries).expand(features.size(0), -1, -1)
        out, weights = self.attention(query, key.expand_as(value), value, patch_mask, need_weights=return_attention)
        tokens = self.dropout(out)
        if self.ff is not None and self.ff_norm is not None:
            tokens = tokens + self.dropout(self.ff(self.ff_norm(tokens)))
        tokens = self.norm(tokens)
        return EncoderOutput(self._read(tokens), tokens, weights)

    def _read(self, tokens: Tensor) -> dict[str, Tensor]:
        """``y_v = w_v . sum_r M_rv o_r + n_v b_v``: what the sum of masked read-outs of all queries is."""
        result, start = {}, 0
        for name, layer in self.readout.items():
            assert isinstance(layer, nn.Linear)
            mask: Tensor = getattr(self, f"mask_{name}")
            vertices: Tensor = getattr(self, f"members_{name}")
            members = vertices.split(self._counts[name])
            # Only the vertices of a query's own region are computed.
            parts = [tokens[:, start + r] @ layer.weight[index].T for r, index in enumerate(members)]
            start += len(members)
            sums = tokens.new_zeros(tokens.size(0), mask.size(1))
            result[name] = sums.index_add(1, vertices, torch.cat(parts, 1)) + mask.sum(0) * layer.bias
        return result

    def _position(self, grid: tuple[int, int], like: Tensor) -> Tensor | None:
        if self.config.position is None:
            return None
        if self.config.position == "sine":
            return sine_position(*grid, self.config.d_model).to(like)
        rows = self.rows[: grid[0], None].expand(*grid, -1)
        columns = self.columns[None, : grid[1]].expand(*grid, -1)
        return torch.cat((rows, columns), -1).flatten(0, 1)

    def _check(self, features: Tensor, grid: tuple[int, int], mask: Tensor | None) -> None:
        c = self.config
        if features.ndim != 3 or features.size(2) != c.feature_dim:
            raise ValueError(f"features must be [B, S, {c.feature_dim}], got {list(features.shape)}")
        if grid[0] * grid[1] != features.size(1):
            raise ValueError(
                f"a grid of {grid[0]} x {grid[1]} has {grid[0] * grid[1]} patches, got {features.size(1)} tokens; "
                "leave out class and register tokens"
            )
        if c.position == "learned" and max(grid) > c.max_grid:
            raise ValueError(f"the learnt position table holds {c.max_grid} rows and columns, got {grid}")
        if mask is not None and (mask.shape != features.shape[:2] or not bool(mask.any(1).all())):
            raise ValueError("patch_mask must be bool [B, S] with at least one real patch in each picture")


def attention_maps(output: EncoderOutput, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Mean attention of all heads, [B, R, height, width], enlarged to the picture's size.

    Raises:
        ValueError: the output holds no attention.
    """
    if output.attention is None:
        raise ValueError("the output holds no attention; call the encoder with return_attention=True")
    maps = output.attention.mean(1).unflatten(-1, grid)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
