"""The blocks of sequences: given as they grow, found in the prefix cache when they begin, kept there when they end.

A block is a page of the key-value cache; the list of a sequence's blocks is its block table.
"""

from __future__ import annotations

from typing import Any

from eff_serve.engine.prefix import Chain, PrefixCache, root_of
from eff_serve.engine.sequence import Sequence


class BlockManager:
    """Gives sequences blocks, and lets them read one another's.

    Args:
        decoder: The model; one without ``copy_page`` shares nothing.
        block_size: Keys of a block.
        prefix_cache: Whether anything is shared.
    """

    def __init__(self, decoder: Any, block_size: int, *, prefix_cache: bool) -> None:
        self.cache = PrefixCache(decoder.num_pages, block_size)
        self.pool = self.cache.pool
        self._decoder, self.block_size = decoder, block_size
        self._shares = prefix_cache and hasattr(decoder, "copy_page")

    def needed(self, keys: int) -> int:
        """Blocks that hold so many keys."""
        return -(-keys // self.block_size)

    def extend(self, sequence: Sequence, count: int) -> bool:
        """Give a sequence blocks for ``count`` more keys; False, and nothing, where too few are free."""
        wanted = self.needed(sequence.cached + count) - len(sequence.block_table)
        if wanted > 0:
            taken = self.pool.take(wanted)
            if taken is None:
                return False
            sequence.block_table.extend(taken)
        return True

    def begin(self, sequence: Sequence, adapter: int) -> None:
        """Give a sequence without keys what the cache holds of it, all but its last token.

        Args:
            sequence: The sequence.
            adapter: Number of its adapter; -1 for none.
        """
        if not self._shares or sequence.sampling.ruled:
            return  # rules of attention know what they have read themselves, and no more
        if sequence.chain is None:
            root = root_of(sequence.sampling, adapter)
            sequence.chain = Chain(root, sequence.tokens, self.block_size, sequence.pictures)
        if sequence.sampling.prompt_logprobs is not None and not sequence.output:
            return  # the scores of the prompt need the model's view of each of its tokens
        found = self.cache.find(sequence.chain, len(sequence.tokens) - 1)
        sequence.block_table.extend(found.blocks)
        sequence.shared = len(found.blocks)
        sequence.cached = len(found.blocks) * self.block_size
        if found.source is not None:
            if (blocks := self.pool.take(1)) is not None:
                self._decoder.copy_page(found.source, blocks[0], found.copied)
                sequence.block_table.extend(blocks)
                sequence.cached += found.copied
            self.pool.give_back([found.source])
        if sequence.reused is None:
            sequence.reused = min(sequence.cached, sequence.prompt_length)

    def share(self, sequence: Sequence) -> None:
        """Let other sequences read the blocks that are full."""
        if sequence.chain is not None:
            count = self._shareable(sequence)
            self.cache.add(sequence.chain, sequence.block_table, sequence.shared, count)
            sequence.shared = max(sequence.shared, count // self.block_size)

    def free(self, sequence: Sequence) -> None:
        """Let go of a sequence's blocks; what they hold can be found again until they are needed."""
        if sequence.chain is not None and sequence.block_table:
            self.share(sequence)
            self.cache.add_part(sequence.chain, sequence.block_table, self._shareable(sequence))
        self.pool.give_back(sequence.block_table)
        sequence.cached = sequence.shared = 0

    def _shareable(self, sequence: Sequence) -> int:
        """Keys that are those of reading the text; with layer reuse, generated tokens have others."""
        exact = getattr(self._decoder, "reuse", None) is None
        return sequence.cached if exact else min(sequence.cached, sequence.prompt_length)
