"""Layer reuse over pages: layers that attend only to blocks of keys that an earlier layer chose in the same step."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from eff_attention.layer_reuse import LayerReuseConfig, LayerReusePolicy, Selector, pooled_mass, select_blocks
from eff_kernels import decode_attention, scored_decode_attention
from torch import Tensor
from torch.nn import functional


class LayerReuse:
    """A policy for the layers of one decoder, with its settings.

    Args:
        policy: Kind and source of each layer.
        config: How many keys, and from which length on; each request has its own length.
        num_layers: Layers of the decoder.
        page: Keys of a page.

    Raises:
        ValueError: the policy is for another number of layers, blocks are not whole pages, or a setting is one that is
            not served: the selector "hash", or prompts by the policy.
    """

    def __init__(self, policy: LayerReusePolicy, config: LayerReuseConfig, *, num_layers: int, page: int) -> None:
        if len(policy.kind) != num_layers:
            raise ValueError(f"the policy of layer reuse has {len(policy.kind)} layers, the model {num_layers}")
        if config.block_size % page:
            raise ValueError(
                f"block_size={config.block_size} of layer reuse must be a multiple of {page}, a page's keys"
            )
        if config.selector == "hash" or config.phase != "decode":
            raise ValueError(
                f"selector={config.selector!r} and phase={config.phase!r} of layer reuse; eff-serve has the selectors "
                "'exact' and 'pooled', and reads prompts densely"
            )
        self.config, self.page, self.source = config, page, policy.source
        self.anchors = {s for s in policy.source if s >= 0}
        pooled = self.anchors if config.selector == "pooled" else ()
        self.sums: dict[int, Tensor | None] = {i: None for i in pooled if policy.kind[i] == "anchor"}

    def __str__(self) -> str:
        reusing = sum(s >= 0 for s in self.source)
        c = self.config
        return f"layer reuse in {reusing} of {len(self.source)} layers: {c.top_k} keys beyond {c.min_seq_len}"

    def count(self, lengths: list[int]) -> int:
        """How many sequences of these lengths decode with fewer keys."""
        return sum(n > self.config.min_seq_len for n in lengths) if self.anchors else 0

    def wrote(self, layer: int, keys: Tensor, pages: Tensor, counts: Tensor) -> None:
        """Take note of new keys of a layer; layers that rank by sums of keys keep those of each page up to date.

        Args:
            layer: Number of the layer.
            keys: Its cache, [pages, KV, page, D].
            pages: Those that were written to, int64 [n].
            counts: Keys that each of them holds now, from its first on, int64 [n].
        """
        if layer not in self.sums:
            return
        sums = self.sums[layer]
        if sums is None:
            self.sums[layer] = sums = keys.new_zeros(keys.size(0), keys.size(1), keys.size(3))
        absent = torch.arange(self.page) >= counts[:, None]
        sums[pages] = keys[pages].masked_fill_(absent[:, None, :, None], 0).sum(2)

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
        source = reuse.source[layer]
        if layer in reuse.sums:
            self._store_selection(layer, self._pooled_mass(layer, q, keys.size(1)))
            source = layer
        if source >= 0:
            pages, lengths = self._chosen[source]
            return decode_attention(q, keys, values, lengths, block_table=pages)
        if layer not in reuse.anchors:
            return decode_attention(q, keys, values, self._real, block_table=self._table)
        size = reuse.config.block_size
        out, mass = scored_decode_attention(q, keys, values, self._real, block_table=self._table, score_block=size)
        self._store_selection(layer, mass)
        return out

    def _pooled_mass(self, layer: int, q: Tensor, kv_heads: int) -> Tensor:
        """Of each block of each sequence, from the sums of its pages."""
        reuse, size = self._reuse, self._reuse.config.block_size
        sums, pages = reuse.sums[layer], self._table.size(1)
        assert sums is not None  # the key of this step has been written
        absent = torch.arange(pages) * reuse.page >= self._real[:, None]
        of_pages = sums[self._table.long()].masked_fill_(absent[..., None, None], 0)  # [T, pages, KV, D]
        of_pages = functional.pad(of_pages, (0, 0, 0, 0, 0, -pages % (size // reuse.page)))
        of_blocks = of_pages.unflatten(1, (-1, size // reuse.page)).sum(2).transpose(1, 2)
        counts = (self._real[:, None, None] - torch.arange(of_blocks.size(2)) * size).clamp(0, size)
        return pooled_mass(q.unflatten(1, (kv_heads, -1)), of_blocks, counts, q.size(-1) ** -0.5)

    def _store_selection(self, layer: int, mass: Tensor) -> None:
        """Note the pages of the blocks that a layer gives the most weight."""
        reuse = self._reuse
        chosen = select_blocks(mass, self._lengths, reuse.config)
        each = reuse.config.block_size // reuse.page
        number = (chosen.blocks[..., None] * each + torch.arange(each)).flatten(2).clamp_(max=self._table.size(1) - 1)
        pages = self._table[:, None].expand(-1, number.size(1), -1).gather(2, number)
        self._chosen[layer] = pages, chosen.lengths


def read_reuse(
    path: Path,
    *,
    top_k: int | None,
    min_seq_len: int | None,
    num_layers: int,
    page: int,
    selector: Selector | None = None,
) -> LayerReuse:
    """A policy file, with what its ``meta`` says of the fields of `LayerReuseConfig`.

    Args:
        path: JSON, as `LayerReusePolicy.save` writes it.
        top_k: Instead of what the file says.
        min_seq_len: Instead of what the file says.
        num_layers: Layers of the decoder.
        page: Keys of a page.
        selector: Instead of what the file says.

    Raises:
        ValueError: the file is no policy, or not one for this model.
    """
    try:
        policy = LayerReusePolicy.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a policy of layer reuse: {error}") from error
    default = LayerReuseConfig()
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
        selector=selector or policy.meta.get("selector", default.selector),
        phase=policy.meta.get("phase", default.phase),
    )
    return LayerReuse(policy, config, num_layers=num_layers, page=page)
