"""What the layers of a model attend to, measured while it reads on after a long prompt (HyLRA, arXiv 2602.00777).

For each step the softmax over all keys is summed over blocks and over the query heads of a key-value head. From these
masses come the share of blocks that hold 90 % (`ReuseProfile.ratio90`), and the overlap of the blocks that two layers
would choose (`ReuseProfile.overlap`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from eff_kernels.edit import Record
from eff_kernels.edit.attention import (
    Attend,
    AttentionCall,
    AttentionOutput,
    decoder_attention,
    intercept_attention,
    rows,
)
from eff_kernels.edit.caches import cache_kwargs
from numpy.typing import NDArray
from torch import Tensor, nn

from eff_attention.layer_reuse.blocks import block_mass, heaviest, ratio90
from eff_attention.layer_reuse.config import check_blocks
from eff_attention.layers import attention_types


@dataclass(frozen=True, slots=True)
class ReuseProfile(Record):
    """Statistics of a model's layers.

    Attributes:
        overlap: float32 [H, L, L], for each key-value head (one, if heads share their choice) and layers i <= j the
            mean share of the blocks chosen by j that i chooses too; 1 on the diagonal, 0 below it.
        ratio90: float32 [T, L, H], see `blocks.ratio90`; large where attention is diffuse.
        rnmse: float32 [L], relative error of a layer's attention when it alone is kept to its chosen blocks.
        kl: float32 [L], divergence of the next-token distribution that this causes, in nats.
        meta: Model, sizes, and number of steps.
    """

    overlap: NDArray[np.float32]
    ratio90: NDArray[np.float32]
    rnmse: NDArray[np.float32]
    kl: NDArray[np.float32]
    meta: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def merge(cls, profiles: Sequence[ReuseProfile]) -> ReuseProfile:
        """One profile of several texts, each with the weight of its steps.

        Raises:
            ValueError: they are of different models or sizes.
        """
        if not profiles or any(p.overlap.shape != profiles[0].overlap.shape for p in profiles):
            raise ValueError(f"profiles must have one shape, got {[p.overlap.shape for p in profiles]}")
        steps = np.array([len(p.ratio90) for p in profiles], np.float64)

        def mean(name: str) -> NDArray[np.float32]:
            stack = np.stack([getattr(p, name) for p in profiles])
            return np.tensordot(steps / steps.sum(), stack, 1).astype(np.float32)

        ratio = np.concatenate([p.ratio90 for p in profiles])
        meta = {**profiles[0].meta, "steps": int(steps.sum())}
        return cls(mean("overlap"), ratio, mean("rnmse"), mean("kl"), meta)


@torch.no_grad()
def profile_layer_reuse(
    model: nn.Module,
    input_ids: Tensor,
    *,
    steps: int = 64,
    block_size: int = 64,
    top_k: int = 1024,
    sink_tokens: int = 64,
    recent_tokens: int = 256,
    shared_heads: bool = False,
    sensitivity: bool = True,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> ReuseProfile:
    """Profile a decoder of transformers on one text.

    All but the last ``steps`` tokens are read as a prompt, densely; the last ones are read in one piece, query t seeing
    what it would when decoding, which gives the same statistics as one step after the other.

    Args:
        model: A decoder that gets its attention from transformers' AttentionInterface; it is left as it was.
        input_ids: int64 [1, n], without padding.
        steps: Tokens to look at.
        block_size: Keys of a block.
        top_k: Keys that a layer may choose, a multiple of ``block_size``.
        sink_tokens: Keys at the beginning that are always chosen.
        recent_tokens: Latest keys that are always chosen.
        shared_heads: Whether all key-value heads of a layer choose the same blocks, by their common mass.
        sensitivity: Whether to measure `rnmse` and `kl`, which takes one more pass over the last tokens for each layer;
            they are NaN without.
        progress: Called with the passes done and their number.

    Raises:
        ValueError: a size does not fit the others or the text.
        NotImplementedError: the model has layers with a sliding window or of another kind.
    """
    if input_ids.dim() != 2 or input_ids.size(0) != 1:
        raise ValueError(f"input_ids must be [1, n], got {list(input_ids.shape)}")
    if min(sink_tokens, recent_tokens) < 0:
        raise ValueError(f"sink_tokens={sink_tokens} and recent_tokens={recent_tokens} must not be negative")
    check_blocks(top_k, block_size, 0, "")
    sink, recent = (math.ceil(n / block_size) for n in (sink_tokens, recent_tokens))
    check_blocks(top_k, block_size, sink + recent, "sink_tokens and recent_tokens")
    length = input_ids.size(1)
    if not 1 <= steps < length or length - steps < top_k:
        raise ValueError(f"a text of {length} tokens is too short for {steps} steps after a prompt of top_k={top_k}")
    check_layers(model)
    names = set(decoder_attention(model))
    from transformers import DynamicCache

    must = (*range(sink), *range(-recent, 0))
    look = _Look(block_size, top_k // block_size, must, shared_heads)
    host: Any = model
    total = 2 + (host.config.num_hidden_layers if sensitivity else 0)
    cache = DynamicCache(config=host.config)
    argument = cache_kwargs(host, cache)
    host(input_ids[:, : length - steps], use_cache=True, logits_to_keep=1, **argument)
    progress(1, total)

    def read() -> Tensor:
        logits = host(input_ids[:, length - steps :], use_cache=True, **argument).logits[0]
        cache.crop(-steps)
        return logits.float().log_softmax(-1)

    with intercept_attention(model, look, where=lambda name, module: name in names):
        base = read()
        progress(2, total)
        overlap, ratio = look.statistics()
        rnmse, kl = (np.full(len(look.masses), np.nan, np.float32) for _ in range(2))
        look.collect = False
        for layer in range(len(rnmse) if sensitivity else 0):
            look.restricted = layer
            changed = read()
            rnmse[layer] = look.error
            kl[layer] = (base.exp() * (base - changed)).sum(-1).mean().item()
            progress(3 + layer, total)
    meta = {
        "model": type(model).__name__,
        "layers": len(rnmse),
        "steps": steps,
        "context": length,
        "block_size": block_size,
        "top_k": top_k,
        "sink_tokens": sink_tokens,
        "recent_tokens": recent_tokens,
        "shared_heads": shared_heads,
    }
    return ReuseProfile(overlap, ratio, rnmse, kl, meta)


def check_layers(model: nn.Module) -> None:
    """Refuse models whose layers do not all attend to the whole past.

    Raises:
        NotImplementedError: naming what the model has instead.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not decoder_attention(model):
        raise NotImplementedError(f"{type(model).__name__} has no attention implementation to choose (transformers)")
    if other := sorted(set(attention_types(config)) - {"full_attention"}):
        raise NotImplementedError(f"layers must attend to the whole past; the model has {other}")


class _Look:
    """Attention that is dense, and keeps for each layer the masses of the blocks."""

    def __init__(self, block_size: int, count: int, must: tuple[int, ...], shared: bool) -> None:
        self.block_size, self.count, self.must, self.shared = block_size, count, must, shared
        self.thread = threading.get_ident()
        self.masses: list[Tensor] = []
        self.length = 0
        self.collect, self.restricted, self.error = True, -1, float("nan")

    def __call__(self, call: AttentionCall, attend: Attend) -> AttentionOutput:
        """The rule; what other threads run meanwhile is left alone."""
        out = attend(call)
        mine = threading.get_ident() == self.thread and call.num_queries < call.num_keys
        if not mine or not (self.collect or call.layer == self.restricted):
            return out
        weights = rows(call, slice(None)).unflatten(1, (call.num_kv_heads, -1))  # [1, G, h, T, S]
        mass = block_mass(weights.sum(2), self.block_size)[0].transpose(0, 1)  # [T, G, N]
        if self.shared:
            mass = mass.sum(1, keepdim=True)
        if self.collect:
            self.masses.append(mass)
            self.length = call.num_keys
            return out
        chosen = self.top_blocks(mass, call.num_keys).transpose(0, 1)[None]  # [1, G, T, N]
        kept = chosen.repeat_interleave(self.block_size, -1)[..., : call.num_keys]
        kept = kept.repeat_interleave(call.num_heads // kept.size(1), 1)
        sparse = attend(call.replace(mask=kept & call.keep_mask(), causal=False))
        self.error = ((sparse.out - out.out).float().norm() / out.out.float().norm()).item()
        return sparse

    def top_blocks(self, mass: Tensor, length: int) -> Tensor:
        """Which blocks each step chooses, bool [T, G, N]."""
        steps = mass.size(0)
        ends = torch.arange(length - steps, length, device=mass.device) // self.block_size + 1
        return heaviest(mass, self.count, ends, self.must)

    def statistics(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Overlap [G, L, L] and ratio90 [T, L, G] of the pass that was seen."""
        masses = torch.stack(self.masses)  # [L, T, G, N]
        steps = masses.size(1)
        chosen = torch.stack([self.top_blocks(m, self.length) for m in self.masses]).float()
        both = torch.einsum("ltgn,mtgn->tglm", chosen, chosen)
        overlap = (both / chosen.sum(-1).permute(1, 2, 0)[:, :, None, :]).mean(0).triu()
        ends = [(self.length - steps + t) // self.block_size + 1 for t in range(steps)]
        ratio = torch.stack([ratio90(masses[:, t, :, : ends[t]]) for t in range(steps)])
        return overlap.cpu().numpy().astype(np.float32), ratio.cpu().numpy().astype(np.float32)
