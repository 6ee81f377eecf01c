"""Layer reuse over pages: layers that attend only to blocks of keys that an earlier layer chose in the same step."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from eff_attention.layer_reuse import LayerReuseConfig, LayerReusePolicy, choose_blocks
from eff_kernels import decode_attention, scored_decode_attention
from torch import Tensor


class LayerReuse:
    """A policy for the layers of one decoder, with its settings.

    Args:
        policy: Kind and source of each layer.
        config: How many keys, and from which length on; each request has its own length.
        num_layers: Layers of the decoder.
        page: Keys of a page.

    Raises:
        ValueError: the policy is for another number of layers, or blocks are not whole pages.
    """

    def __init__(self, policy: LayerReusePolicy, config: LayerReuseConfig, *, num_layers: int, page: int) -> None:
        if len(policy.kind) != num_layers:
            raise ValueError(f"the policy of layer reuse has {len(policy.kind)} layers, the model {num_layers}")
        if config.block_size % page:
            raise ValueError(
                f"block_size={config.block_size} of layer reuse must be a multiple of {page}, a page's keys"
            )
        self.config, self.page, self.source = config, page, policy.source
        self.anchors = {s for s in policy.source if s >= 0}

    def __str__(self) -> str:
        reusing = sum(s >= 0 for s in self.source)
        c = self.config
        return f"layer reuse in {reusing} of {len(self.source)} layers: {c.top_k} keys beyond {c.min_seq_len}"

    def count(self, lengths: list[int]) -> int:
        """How many sequences of these lengths decode with fewer keys."""
        return sum(n > self.config.min_seq_len for n in lengths) if self.anchors else 0

    def step(self, lengths: list[int], block_table: Tensor) -> ReuseStep | None:
        """A decoding step for sequences with that many keys, or None where all of them are short."""
        return ReuseStep(self, lengths, block_table) if self.count(lengths) else None


class ReuseStep:
    """One decoding step: what its anchors chose."""

    def __init__(self, reuse: LayerReuse, lengths: list[int], block_table: Tensor) -> None:
        self._reuse, self._lengths, self._table = reuse, lengths, block_table
        self._real = torch.tensor(lengths, dtype=torch.int32)
        self._chosen: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention [T, H, D] of a layer of any kind."""
        reuse = self._reuse
        if reuse.source[layer] >= 0:
            pages, lengths = self._chosen[reuse.source[layer]]
            return decode_attention(q, keys, values, lengths, block_table=pages)
        if layer not in reuse.anchors:
            return decode_attention(q, keys, values, self._real, block_table=self._table)
        size = reuse.config.block_size
        out, mass = scored_decode_attention(q, keys, values, self._real, block_table=self._table, score_block=size)
        chosen = choose_blocks(mass, self._lengths, reuse.config)
        each = size // reuse.page
        number = (chosen.blocks[..., None] * each + torch.arange(each)).flatten(2).clamp_(max=self._table.size(1) - 1)
        pages = self._table[:, None].expand(-1, number.size(1), -1).gather(2, number)
        self._chosen[layer] = pages, chosen.lengths
        return out


def read_reuse(path: Path, *, top_k: int | None, min_seq_len: int | None, num_layers: int, page: int) -> LayerReuse:
    """A policy file, with what its ``meta`` says of the fields of `LayerReuseConfig`.

    Args:
        path: JSON, as `LayerReusePolicy.save` writes it.
        top_k: Instead of what the file says.
        min_seq_len: Instead of what the file says.
        num_layers: Layers of the decoder.
        page: Keys of a page.

    Raises:
        ValueError: the file is no policy, or not one for this model.
    """
    try:
        policy = LayerReusePolicy.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no policy of layer reuse: {error}") from error
    default = LayerReuseConfig()
    for name in ("selector", "phase"):
        wanted = getattr(default, name)
        if policy.meta.get(name, wanted) != wanted:
            raise ValueError(f"{path} asks for {name}={policy.meta[name]!r}; eff-serve has {wanted!r} alone")
    given = {"top_k": top_k, "min_seq_len": min_seq_len}
    block, keys, least = (
        int(given.get(name) or policy.meta.get(name) or getattr(default, name))
        for name in ("block_size", "top_k", "min_seq_len")
    )
    config = LayerReuseConfig(
        block_size=block,
        top_k=keys,
        min_seq_len=max(least, keys) if min_seq_len is None else least,
        shared_heads=bool(policy.meta.get("shared_heads", default.shared_heads)),
    )
    return LayerReuse(policy, config, num_layers=num_layers, page=page)
