"""The token mixers, with the signature of transformers' attention modules.

Projections are those of the host, under the host's names, so that state_dicts fit wherever shapes do.
B: batch. T: present tokens, S: past and present tokens. H, Hkv: heads of queries and of keys. D: head dimension.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from eff_kernels import self_gated_scan, taylor_linear_attention
from torch import Tensor, nn

from eff_attention.autocast import alike
from eff_attention.variants.config import AttentionVariantConfig
from eff_attention.variants.context import VariantContext

Rotation = tuple[Tensor, Tensor]


class VariantMixer(nn.Module):
    """What the mixers share. ``layer_idx`` counts from 0, as in transformers."""

    def __init__(self, settings: AttentionVariantConfig, layer_idx: int) -> None:
        super().__init__()
        self.settings = settings
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotation | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        variant_context: VariantContext | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Mix the tokens of ``hidden_states`` [B, T, d]; the maps are in ``variant_context.weights`` if wanted.

        The cache is ``past_key_values``, or ``cache`` from transformers 5.24 on.
        """
        context = VariantContext() if variant_context is None else variant_context
        if variant_context is None and attention_mask is not None:
            raise ValueError(
                "attention_mask: a mixer alone takes padding as variant_context=VariantContext(key_mask=...)"
            )
        cache = past_key_values if cache is None else cache
        layer = None if cache is None else cache.layers[self.layer_idx]
        out = self.mix(hidden_states, position_embeddings, context, layer)
        if layer is not None:
            layer.seen += hidden_states.size(1)
        return out, None

    def mix(self, hidden: Tensor, rotation: Rotation | None, context: VariantContext, layer: Any) -> Tensor:
        """The mixer itself; ``layer`` is a `VariantCacheLayer` or None."""
        raise NotImplementedError


class MLPMixer(VariantMixer):
    """No mixing at all: a gated MLP in the place of attention, with as many parameters."""

    def __init__(self, settings: AttentionVariantConfig, layer_idx: int, width: int, inner: int) -> None:
        super().__init__(settings, layer_idx)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def mix(self, hidden: Tensor, rotation: Rotation | None, context: VariantContext, layer: Any) -> Tensor:
        """down(silu(gate(h)) * up(h))."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


class _Projected(VariantMixer):
    """A mixer with the projections of a host's attention, which it takes over."""

    def __init__(self, settings: AttentionVariantConfig, host: nn.Module) -> None:
        super().__init__(settings, int(host.layer_idx))  # type: ignore[arg-type]
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            host.get_submodule(f"{name}_proj") for name in ("q", "k", "v", "o")
        )
        self.head_dim = int(host.head_dim)  # type: ignore[arg-type]
        self.scaling = float(host.scaling)  # type: ignore[arg-type]
        norms = (getattr(host, "q_norm", None), getattr(host, "k_norm", None))
        if settings.qk_norm and None in norms:
            weight = self.q_proj.weight
            make = functools.partial(_Norm, self.head_dim, 1e-6, device=weight.device, dtype=weight.dtype)
            norms = make(), make()
        self.q_norm, self.k_norm = norms

    def query_key(self, source: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """Queries [B, H, T, D] and keys [B, Hkv, T, D] of what they are made from."""
        q, k = self.heads(self.q_proj(source)), self.heads(self.k_proj(source))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return (rotate(q, rotation), rotate(k, rotation)) if self.settings.rope and rotation is not None else (q, k)

    def heads(self, x: Tensor) -> Tensor:
        """[B, T, H D] -> [B, H, T, D]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        """[B, H, T, D] -> [B, T, d], by the output projection."""
        out: Tensor = self.o_proj(x.transpose(1, 2).flatten(2))
        return out


class _Norm(nn.RMSNorm):
    """RMSNorm in the dtype of its weight, as the norms of transformers' models are under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class TaylorAttention(_Projected):
    """Kind "approximate": weights 1 + s + s^2 / 2 in the place of exp(s), normalised together."""

    def mix(self, hidden: Tensor, rotation: Rotation | None, context: VariantContext, layer: Any) -> Tensor:
        """By the features in time linear in the tokens; the cache holds their sums."""
        q, k, v = alike(*self.query_key(hidden, rotation), self.heads(self.v_proj(hidden)))
        mask = None if context.key_mask is None else context.key_mask[:, -hidden.size(1) :]
        if context.weights is not None:
            score = _scores(q, k) * self.scaling
            weight = (1 + score + score.square() / 2).masked_fill(~_seen(score, mask), 0)
            context.weights[self.layer_idx] = weight / weight.sum(-1, keepdim=True).clamp(min=1e-30)
        out = taylor_linear_attention(
            q, k, v, mask, chunk_size=self.settings.chunk_size, scale=self.scaling,
            state=None if layer is None else layer.state, return_state=layer is not None,
        )  # fmt: skip
        if layer is not None:
            layer.state = out.state
        return self.join(out.output)


class SelfGatedSoftmax(_Projected):
    """Kind "non_approximate": the score of a key is the product with the query of its own position, silu(W_q h)."""

    def mix(self, hidden: Tensor, rotation: Rotation | None, context: VariantContext, layer: Any) -> Tensor:
        """By a running mean; the cache holds it."""
        q, k = self.heads(F.silu(self.q_proj(hidden))), self.heads(self.k_proj(hidden))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        groups = q.size(1) // k.size(1)
        score = (q.unflatten(1, (-1, groups)).float() * k.unsqueeze(2).float()).sum(-1).flatten(1, 2) * self.scaling
        if context.key_mask is not None:
            score = score.masked_fill(~context.key_mask[:, None, -hidden.size(1) :], -torch.inf)
        if context.weights is not None:
            mask = None if context.key_mask is None else context.key_mask[:, -hidden.size(1) :]
            dense = score.unsqueeze(-2).expand(*score.shape, -1)
            context.weights[self.layer_idx] = _softmax(dense, mask, score.dtype)
        state = None if layer is None else layer.state
        out = self_gated_scan(score, self.heads(self.v_proj(hidden)), state=state, return_state=layer is not None)
        if layer is not None:
            layer.state = out.state
        return self.join(out.output)


class StaticMapAttention(_Projected):
    """Kind "rnd_emb_qk", "fixed_seq_qk": queries and keys of a constant sequence that runs through the same layers."""

    def mix(self, hidden: Tensor, rotation: Rotation | None, context: VariantContext, layer: Any) -> Tensor:
        """One map for the whole batch, unless there is padding; the cache holds values alone."""
        v = self.heads(self.v_proj(hidden))
        if context.stream_row:
            q, k = self.query_key(hidden[:1], rotation and (rotation[0][:1], rotation[1][:1]))
        elif context.record is not None:
            q, k = context.record[self.layer_idx] = self.query_key(hidden, rotation)
        elif self.layer_idx in context.maps:
            q, k = context.maps[self.layer_idx]
        else:
            raise ValueError(f"layer {self.layer_idx} has a static map, which only the whole decoder can compute")
        if layer is not None:
            v = layer.append(v)
        total = v.size(2)
        if context.query_positions is None or context.key_positions is None:
            q, k = q[:, :, context.past : total], k[:, :, :total]
        else:
            q, k = (x[0, :, at].transpose(0, 1) for x, at in ((q, context.query_positions), (k, context.key_positions)))
        weight = _softmax(_scores(q, k) * self.scaling, context.key_mask, v.dtype)
        if context.weights is not None:
            context.weights[self.layer_idx] = weight.expand(v.size(0), -1, -1, -1)
        v = v.repeat_interleave(weight.size(1) // v.size(1), 1)
        if weight.size(0) == v.size(0):
            return self.join(weight @ v)
        mixed = weight[0] @ v.permute(1, 2, 0, 3).flatten(2)  # one map for all rows: [H, T, S] by [H, S, B D]
        return self.join(mixed.unflatten(-1, (v.size(0), -1)).permute(2, 0, 1, 3))


class StaticEmbAttention(_Projected):
    """Kind "static_emb_qk": queries and keys of the input's embeddings, whatever the layer."""

    def mix(self, hidden: Tensor, rotation: Rotation | None, context: VariantContext, layer: Any) -> Tensor:
        """Attention whose map follows from the token ids; the cache holds keys and values."""
        if self.layer_idx not in context.embeddings:
            raise ValueError(
                f"layer {self.layer_idx} makes its map from embeddings, which only the decoder can hand it"
            )
        q, k = self.query_key(context.embeddings[self.layer_idx], rotation)
        v = self.heads(self.v_proj(hidden))
        if layer is not None:
            k, v = layer.append_keys(k), layer.append(v)
        weight = _softmax(_scores(q, k) * self.scaling, context.key_mask, v.dtype)
        if context.weights is not None:
            context.weights[self.layer_idx] = weight
        return self.join(weight @ v.repeat_interleave(weight.size(1) // v.size(1), 1))


def inner_width(parameters: int, width: int) -> int:
    """Inner width of an `MLPMixer` with about so many parameters."""
    return max(1, math.floor(parameters / (3 * width) + 0.5))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary position embedding, halves against each other as in Llama."""
    cos, sin = (t.unsqueeze(1) for t in rotation)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.repeat_interleave(q.size(1) // k.size(1), 1).mT


def _seen(score: Tensor, key_mask: Tensor | None) -> Tensor:
    """True where a key comes not after its query and is no padding."""
    t, s = score.shape[-2:]
    seen = torch.ones(t, s, dtype=torch.bool, device=score.device).tril(s - t)
    return seen if key_mask is None else seen & key_mask[:, None, None, :]


def _softmax(score: Tensor, key_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Causal softmax in float32; zeros for a query with no key to see, and no NaN in its gradient."""
    seen = _seen(score, key_mask)
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    weight = score.masked_fill(~seen, torch.finfo(score.dtype).min).softmax(-1)
    return (weight if key_mask is None else weight.masked_fill(~seen, 0)).to(dtype)
