"""Keys and values that several requests share: blocks of the cache, found again by what was read up to their end.

A block of keys depends on all tokens up to its last and on what else changes the model's hidden states: an adapter, a
picture. Its digest says all that: that of the block before, its own tokens, and of its pictures what they show. Equal
digests stand for equal keys. Blocks that are full never change, so that any number of requests may read them. Of a
block that only begins like the one that is wanted, or that is not full, the matching keys are copied.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, fields
from itertools import islice

from eff_serve.engine.block_pool import BlockPool
from eff_serve.engine.types import Sampling
from eff_serve.pictures.prompt import PromptPictures

_CHOICE = frozenset(
    {
        *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"),
        *("presence_penalty", "frequency_penalty", "logit_bias", "stop_token_ids", "ignore_eos", "logprobs"),
        *("prompt_logprobs", "grammar"),
    }
)
"""Settings that act on logits alone. All others are part of the digest, those of later versions included."""

_MOST_CHILDREN = 64
"""Blocks that are compared token by token for the longest common beginning."""


class Chain:
    """The digests of a growing list of tokens, block by block.

    Args:
        root: What the keys depend on beside the tokens, see `root_of`.
        tokens: The sequence's tokens; the list may grow, and is not copied.
        block_size: Keys of a block.
        pictures: The sequence's pictures.
    """

    def __init__(self, root: bytes, tokens: list[int], block_size: int, pictures: PromptPictures | None = None) -> None:
        self.root, self.tokens, self.block_size = root, tokens, block_size
        self._pictures = pictures
        self._digests: list[bytes] = []

    def parent(self, number: int) -> bytes:
        """Digest of what lies before block ``number``."""
        return self.digest(number - 1) if number else self.root

    def digest(self, number: int) -> bytes:
        """Digest of everything up to the end of block ``number``, all of whose tokens must be known."""
        while len(self._digests) <= number:
            place = len(self._digests)
            self._digests.append(
                self._extend(self.parent(place), place * self.block_size, (place + 1) * self.block_size)
            )
        return self._digests[number]

    def part(self, count: int) -> bytes:
        """Digest of the first ``count`` tokens, which end within a block."""
        number = count // self.block_size
        return self._extend(self.parent(number), number * self.block_size, count)

    def shows_pictures(self, start: int, end: int) -> bool:
        """Whether a picture stands in these places."""
        return self._pictures is not None and bool(
            ((self._pictures.places >= start) & (self._pictures.places < end)).any()
        )

    def _extend(self, parent: bytes, start: int, end: int) -> bytes:
        digest = hashlib.blake2b(parent, digest_size=16)
        digest.update(array("q", self.tokens[start:end]).tobytes())
        if self._pictures is not None and self.shows_pictures(start, end):
            places = self._pictures.places
            here = (places >= start) & (places < end)
            digest.update(b"pictures" + places[here].numpy().tobytes())
            digest.update(self._pictures.embeddings[here].contiguous().numpy().tobytes())
        return digest.digest()


def root_of(sampling: Sampling, adapter: int = -1) -> bytes:
    """What the keys of a request depend on beside its tokens.

    Args:
        sampling: The request's settings; those that act on the model count.
        adapter: Number of its adapter, which is another one where a name was reloaded.
    """
    acting = [(f.name, getattr(sampling, f.name)) for f in fields(sampling) if f.name not in _CHOICE]
    return hashlib.blake2b(repr((adapter, acting)).encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Found:
    """What the cache holds of a text.

    Attributes:
        blocks: Full blocks from its beginning, each of which the finder now holds.
        source: A block whose first ``copied`` keys go on from there, also held; None where there is none.
    """

    blocks: list[int]
    source: int | None = None
    copied: int = 0


@dataclass(frozen=True, slots=True)
class _Entry:
    parent: bytes
    digest: bytes
    tokens: tuple[int, ...]
    comparable: bool  # whether its tokens say all: it shows no picture


class PrefixCache:
    """Finds blocks by what they hold.

    Args:
        num_blocks: Blocks of the key-value cache.
        block_size: Keys of a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks, self._forget)
        self._block_size = block_size
        self._by_digest: dict[bytes, int] = {}
        self._entries: dict[int, _Entry] = {}
        self._children: dict[bytes, dict[int, None]] = {}

    def find(self, chain: Chain, most: int) -> Found:
        """Blocks that hold the first of the tokens of a chain, at most ``most`` of them; the caller holds them then."""
        blocks: list[int] = []
        while (len(blocks) + 1) * self._block_size <= most:
            block = self._by_digest.get(chain.digest(len(blocks)))
            if block is None:
                break
            self.pool.hold(block)
            blocks.append(block)
        start = len(blocks) * self._block_size
        wanted = chain.tokens[start : min(most, start + self._block_size)]
        source, copied = None, 0
        if wanted and not chain.shows_pictures(start, start + len(wanted)):
            for block in islice(reversed(self._children.get(chain.parent(len(blocks)), {})), _MOST_CHILDREN):
                entry = self._entries[block]
                same = _common(entry.tokens, wanted) if entry.comparable else 0
                if same > copied:
                    source, copied = block, same
        if source is not None:
            self.pool.hold(source)
        return Found(blocks, source, copied)

    def add(self, chain: Chain, blocks: list[int], first: int, count: int) -> None:
        """Make blocks findable that hold the first ``count`` tokens of a chain, from block number ``first`` on.

        Those that hold what another block holds already stay their holder's own.
        """
        for number in range(first, count // self._block_size):
            self._add(chain, number, blocks[number], chain.digest(number), self._block_size)

    def add_part(self, chain: Chain, blocks: list[int], count: int) -> None:
        """Make the last block findable, whose holder will not write to it again; it need not be full."""
        if rest := count % self._block_size:
            self._add(chain, count // self._block_size, blocks[count // self._block_size], chain.part(count), rest)

    def _add(self, chain: Chain, number: int, block: int, digest: bytes, size: int) -> None:
        if digest in self._by_digest or block in self._entries:
            return
        parent, start = chain.parent(number), number * self._block_size
        tokens = tuple(chain.tokens[start : start + size])
        self._entries[block] = _Entry(parent, digest, tokens, not chain.shows_pictures(start, start + size))
        self._by_digest[digest] = block
        self._children.setdefault(parent, {})[block] = None
        self.pool.keep(block)

    def _forget(self, block: int) -> None:
        entry = self._entries.pop(block)
        del self._by_digest[entry.digest]
        siblings = self._children[entry.parent]
        del siblings[block]
        if not siblings:
            del self._children[entry.parent]


def _common(a: tuple[int, ...], b: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
