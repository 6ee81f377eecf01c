"""The pages of sequences in a prefix cache: found when a sequence begins, shared as they fill, kept when it ends."""

from __future__ import annotations

from typing import Any

from eff_serve.engine.prefix import Chain, PrefixCache, root_of
from eff_serve.engine.sequence import Sequence


class Sharing:
    """Lets sequences read one another's pages.

    Args:
        decoder: The model; one without ``copy_page`` shares nothing.
        page: Keys of a page.
        on: Whether anything is shared.
    """

    def __init__(self, decoder: Any, page: int, *, on: bool) -> None:
        self.cache = PrefixCache(decoder.num_pages, page)
        self.pool = self.cache.pool
        self._decoder, self._page = decoder, page
        self._on = on and hasattr(decoder, "copy_page")

    def begin(self, sequence: Sequence, adapter: int) -> None:
        """Give a sequence without keys what the cache holds of it, all but its last token.

        Args:
            sequence: The sequence.
            adapter: Number of its adapter; -1 for none.
        """
        if not self._on or sequence.sampling.ruled:
            return  # rules of attention know what they have read themselves, and no more
        if sequence.chain is None:
            root = root_of(sequence.sampling, adapter)
            sequence.chain = Chain(root, sequence.tokens, self._page, sequence.pictures)
        if sequence.sampling.prompt_logprobs is not None and not sequence.output:
            return  # the scores of the prompt need the model's view of each of its tokens
        found = self.cache.find(sequence.chain, len(sequence.tokens) - 1)
        sequence.pages.extend(found.pages)
        sequence.shared = len(found.pages)
        sequence.cached = len(found.pages) * self._page
        if found.source is not None:
            if (pages := self.pool.take(1)) is not None:
                self._decoder.copy_page(found.source, pages[0], found.copied)
                sequence.pages.extend(pages)
                sequence.cached += found.copied
            self.pool.give_back([found.source])
        if sequence.reused is None:
            sequence.reused = min(sequence.cached, sequence.prompt_length)

    def share(self, sequence: Sequence) -> None:
        """Let other sequences read the pages that are full."""
        if sequence.chain is not None:
            count = self._shareable(sequence)
            self.cache.add(sequence.chain, sequence.pages, sequence.shared, count)
            sequence.shared = max(sequence.shared, count // self._page)

    def give_back(self, sequence: Sequence) -> None:
        """Let go of a sequence's pages; what they hold can be found again until they are needed."""
        if sequence.chain is not None and sequence.pages:
            self.share(sequence)
            self.cache.add_part(sequence.chain, sequence.pages, self._shareable(sequence))
        self.pool.give_back(sequence.pages)
        sequence.cached = sequence.shared = 0

    def _shareable(self, sequence: Sequence) -> int:
        """Keys that are those of reading the text; with layer reuse, generated tokens have others."""
        exact = getattr(self._decoder, "reuse", None) is None
        return sequence.cached if exact else min(sequence.cached, sequence.prompt_length)
