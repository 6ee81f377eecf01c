"""How an anchor ranks blocks of keys without reading the keys: a small index of them, kept from step to step.

A new token adds one key to the index. The run time says when a pass over other tokens or with another cache came
between (`KeyIndex.forget`). That nothing else happened to the cache, such as the reordering of beams, is told by the
last keys: a layer's key at a position depends on every token up to it (in layer 0 on one token alone, so that layer
keeps no index from step to step). Where they are others, the index is rebuilt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_BITS = 128  # of a hash, in two words
_TOLD = 16  # last keys by which a cache is known, or as many as one block has


class KeyIndex(ABC):
    """What one layer remembers of its keys.

    Args:
        block_size: Keys of a block.
        layer: Number of the layer.
    """

    def __init__(self, block_size: int, layer: int) -> None:
        self.block_size, self.layer = block_size, layer
        self.firsts: list[int] = []
        self.lengths: list[int] = []
        self.last: Tensor | None = None

    def mass(self, q: Tensor, k: Tensor, firsts: Sequence[int], lengths: Sequence[int], scale: float) -> Tensor:
        """Bring the index up to date and rank the blocks.

        Args:
            q: [B, H, D], of the current token.
            k: [B, KV, S, D], the cache; sequence b lies at ``firsts[b]`` and the positions after it.
            firsts: First position of each sequence.
            lengths: Keys of each sequence, the current one included.
            scale: Factor of the scores.

        Returns:
            A weight of each block, float32 [B, KV, N], summed over the query heads of each group; larger is better.
            What lies beyond a sequence means nothing.
        """
        firsts, lengths = list(firsts), list(lengths)
        last = self._ends(k, firsts, lengths)
        if self._continues(k, firsts, lengths):
            self._append(last[:, :, -1])
        else:
            room = -(-max(lengths) // self.block_size) * self.block_size
            rows = (k[b, :, f : f + n] for b, (f, n) in enumerate(zip(firsts, lengths, strict=True)))
            self._build(torch.stack([F.pad(r, (0, 0, 0, room - r.size(1))) for r in rows]))
        self.firsts, self.lengths, self.last = firsts, lengths, last
        return self._rank(q.unflatten(1, (k.size(1), -1)), scale)

    def forget(self) -> None:
        """Rebuild the index at the next step."""
        self.last = None

    def _ends(self, k: Tensor, firsts: list[int], lengths: list[int]) -> Tensor:
        """The last keys of each sequence, [B, KV, up to 16, D]; before short ones, padding or zeros."""
        count = min(_TOLD, self.block_size)
        ends = [f + n for f, n in zip(firsts, lengths, strict=True)]
        rows = (k[b, :, max(0, e - count) : e] for b, e in enumerate(ends))
        return torch.stack([F.pad(r, (0, 0, count - r.size(1), 0)) for r in rows])

    def _continues(self, k: Tensor, firsts: list[int], lengths: list[int]) -> bool:
        """Whether each sequence of the index has grown by one key."""
        before = [n - 1 for n in lengths]
        if self.layer == 0 or self.last is None or firsts != self.firsts or before != self.lengths or 0 in before:
            return False
        last = self._ends(k, firsts, before)
        return last.shape == self.last.shape and last.dtype == self.last.dtype and torch.equal(last, self.last)

    def _counts(self, device: torch.device, blocks: int) -> Tensor:
        """Keys of each block, int64 [B, 1, N]."""
        ends = torch.tensor(self.lengths, device=device)[:, None, None]
        return (ends - torch.arange(blocks, device=device) * self.block_size).clamp(0, self.block_size)

    @abstractmethod
    def _build(self, keys: Tensor) -> None:
        """Begin with keys [B, KV, N * block_size, D]; zeros follow each sequence."""

    @abstractmethod
    def _append(self, key: Tensor) -> None:
        """Add one key [B, KV, D] to each sequence, at ``lengths``, which do not count it yet."""

    @abstractmethod
    def _rank(self, q: Tensor, scale: float) -> Tensor:
        """Weight of the blocks, [B, KV, N], for q [B, KV, G, D]."""


class PooledKeys(KeyIndex):
    """The mean of the keys of each block: its mass were they all alike, count * exp(scale * q . mean)."""

    sums: Tensor

    def _build(self, keys: Tensor) -> None:
        self.sums = keys.unflatten(2, (-1, self.block_size)).sum(3, dtype=torch.float32)

    def _append(self, key: Tensor) -> None:
        self.sums = _grown(self.sums, max(self.lengths) // self.block_size + 1, 1)
        for row, n in enumerate(self.lengths):
            self.sums[row, :, n // self.block_size] += key[row]

    def _rank(self, q: Tensor, scale: float) -> Tensor:
        return pooled_mass(q, self.sums, self._counts(q.device, self.sums.size(2)), scale)


def pooled_mass(q: Tensor, sums: Tensor, counts: Tensor, scale: float) -> Tensor:
    """What blocks would weigh were all keys of each alike: count * exp(scale * q . mean), normalised.

    Args:
        q: [B, KV, G, D].
        sums: Of the keys of each block, float32 [B, KV, N, D].
        counts: Keys of each block, [B, 1, N]; 0 for a block that is not there.
        scale: Factor of the scores.

    Returns:
        float32 [B, KV, N], summed over the G query heads of a group.
    """
    means = sums / counts.clamp(min=1)[..., None]
    score = scale * (q.float() @ means.mT) + counts[:, :, None].log()
    return score.softmax(-1).sum(2)


class HashedKeys(KeyIndex):
    """Signs of 128 random projections of each key. A block is as good as its nearest key, by the bits in common with q.

    The projections of each layer and head come from a fixed seed.
    """

    projection: Tensor
    codes: Tensor

    def _build(self, keys: Tensor) -> None:
        generator = torch.Generator().manual_seed(self.layer)
        self.projection = torch.randn(keys.size(1), keys.size(3), _BITS, generator=generator).to(keys.device)
        self.codes = self._hash(keys)

    def _append(self, key: Tensor) -> None:
        self.codes = _grown(self.codes, max(self.lengths) // self.block_size + 1, self.block_size)
        code = self._hash(key[:, :, None])
        for row, n in enumerate(self.lengths):
            self.codes[row, :, n] = code[row, :, 0]

    def _rank(self, q: Tensor, scale: float) -> Tensor:
        places = torch.arange(self.codes.size(2), device=q.device)
        absent = places >= torch.tensor(self.lengths, device=q.device)[:, None]
        distance = _ones(self._hash(q)[:, :, :, None] ^ self.codes[:, :, None]).sum(-1)
        near = (_BITS - distance).masked_fill_(absent[:, None, None], 0)
        return near.unflatten(-1, (-1, self.block_size)).amax(-1).sum(2).float()

    def _hash(self, x: Tensor) -> Tensor:
        """[B, KV, n, D] to words [B, KV, n, 2]."""
        signs = (x.float() @ self.projection > 0).unflatten(-1, (2, 64))
        return (signs.long() << torch.arange(64, device=x.device)).sum(-1)


def _grown(x: Tensor, blocks: int, each: int) -> Tensor:
    """The index, with room for so many blocks of ``each`` entries, and some more if it has to grow."""
    return x if x.size(2) >= blocks * each else F.pad(x, (0, 0, 0, (blocks + blocks // 8) * each - x.size(2)))


def _ones(words: Tensor) -> Tensor:
    """Number of bits that are set, in sums of 2, 4, 8 bits and then of all bytes."""
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (words * 0x0101010101010101) >> 56


SELECTORS: dict[str, type[KeyIndex]] = {"pooled": PooledKeys, "hash": HashedKeys}
