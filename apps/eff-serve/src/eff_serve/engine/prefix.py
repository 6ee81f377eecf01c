"""Keys and values that several requests share: pages of the cache, found again by what was read up to their end.

A page of keys depends on all tokens up to its last and on what else changes the model's hidden states: an adapter, a
picture. Its digest says all that: that of the page before, its own tokens, and of its pictures what they show. Equal
digests stand for equal keys. Pages that are full never change, so that any number of requests may read them. Of a page
that only begins like the one that is wanted, or that is not full, the matching keys are copied.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, fields
from itertools import islice

from eff_serve.engine.pages import PagePool
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
"""Pages that are compared token by token for the longest common beginning."""


class Chain:
    """The digests of a growing list of tokens, page by page.

    Args:
        root: What the keys depend on beside the tokens, see `root_of`.
        tokens: The sequence's tokens; the list may grow, and is not copied.
        page: Keys of a page.
        pictures: The sequence's pictures.
    """

    def __init__(self, root: bytes, tokens: list[int], page: int, pictures: PromptPictures | None = None) -> None:
        self.root, self.tokens, self.page = root, tokens, page
        self._pictures = pictures
        self._digests: list[bytes] = []

    def parent(self, number: int) -> bytes:
        """Digest of what lies before page ``number``."""
        return self.digest(number - 1) if number else self.root

    def digest(self, number: int) -> bytes:
        """Digest of everything up to the end of page ``number``, all of whose tokens must be known."""
        while len(self._digests) <= number:
            place = len(self._digests)
            self._digests.append(self._extend(self.parent(place), place * self.page, (place + 1) * self.page))
        return self._digests[number]

    def part(self, count: int) -> bytes:
        """Digest of the first ``count`` tokens, which end within a page."""
        number = count // self.page
        return self._extend(self.parent(number), number * self.page, count)

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
        adapter: Number of its adapter, which is another one where a name was loaded anew.
    """
    acting = [(f.name, getattr(sampling, f.name)) for f in fields(sampling) if f.name not in _CHOICE]
    return hashlib.blake2b(repr((adapter, acting)).encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Found:
    """What the cache holds of a text.

    Attributes:
        pages: Full pages from its beginning, each of which the finder now holds.
        source: A page whose first ``copied`` keys go on from there, also held; None where there is none.
    """

    pages: list[int]
    source: int | None = None
    copied: int = 0


@dataclass(frozen=True, slots=True)
class _Entry:
    parent: bytes
    digest: bytes
    tokens: tuple[int, ...]
    comparable: bool  # whether its tokens say all: it shows no picture


class PrefixCache:
    """Finds pages by what they hold.

    Args:
        num_pages: Pages of the key-value cache.
        page: Keys of a page.
    """

    def __init__(self, num_pages: int, page: int) -> None:
        self.pool = PagePool(num_pages, self._forget)
        self._page = page
        self._by_digest: dict[bytes, int] = {}
        self._entries: dict[int, _Entry] = {}
        self._children: dict[bytes, dict[int, None]] = {}

    def find(self, chain: Chain, most: int) -> Found:
        """Pages that hold the first of the tokens of a chain, at most ``most`` of them; the caller holds them then."""
        pages: list[int] = []
        while (len(pages) + 1) * self._page <= most:
            page = self._by_digest.get(chain.digest(len(pages)))
            if page is None:
                break
            self.pool.hold(page)
            pages.append(page)
        start = len(pages) * self._page
        wanted = chain.tokens[start : min(most, start + self._page)]
        source, copied = None, 0
        if wanted and not chain.shows_pictures(start, start + len(wanted)):
            for page in islice(reversed(self._children.get(chain.parent(len(pages)), {})), _MOST_CHILDREN):
                entry = self._entries[page]
                same = _common(entry.tokens, wanted) if entry.comparable else 0
                if same > copied:
                    source, copied = page, same
        if source is not None:
            self.pool.hold(source)
        return Found(pages, source, copied)

    def add(self, chain: Chain, pages: list[int], first: int, count: int) -> None:
        """Make pages findable that hold the first ``count`` tokens of a chain, from page number ``first`` on.

        Those that hold what another page holds already stay their holder's own.
        """
        for number in range(first, count // self._page):
            self._add(chain, number, pages[number], chain.digest(number), self._page)

    def add_part(self, chain: Chain, pages: list[int], count: int) -> None:
        """Make the last page findable, whose holder will not write to it again; it need not be full."""
        if rest := count % self._page:
            self._add(chain, count // self._page, pages[count // self._page], chain.part(count), rest)

    def _add(self, chain: Chain, number: int, page: int, digest: bytes, size: int) -> None:
        if digest in self._by_digest or page in self._entries:
            return
        parent, start = chain.parent(number), number * self._page
        tokens = tuple(chain.tokens[start : start + size])
        self._entries[page] = _Entry(parent, digest, tokens, not chain.shows_pictures(start, start + size))
        self._by_digest[digest] = page
        self._children.setdefault(parent, {})[page] = None
        self.pool.keep(page)

    def _forget(self, page: int) -> None:
        entry = self._entries.pop(page)
        del self._by_digest[entry.digest]
        siblings = self._children[entry.parent]
        del siblings[page]
        if not siblings:
            del self._children[entry.parent]


def _common(a: tuple[int, ...], b: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
