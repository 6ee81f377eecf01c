"""Building pairs from a model's own sentences, one after another (SENTINEL, algorithm 1)."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from eff_adapters.sentinel.config import SentinelConfig
from eff_adapters.sentinel.pairs import PreferencePair, save_pairs
from eff_adapters.sentinel.votes import Detector, Judged, Jury, judge_sentence


class Sentence(NamedTuple):
    """A sampled sentence, and whether the model ended its answer behind it."""

    text: str
    ended: bool = False


class SentenceGenerator(Protocol):
    """Samples the next sentence; `SentenceSampler` is one for models of transformers."""

    def __call__(self, image: Any, question: str, context: str, *, n: int, seed: int) -> Sequence[Sentence]:
        """``n`` sentences that may follow the context; the same for the same seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What one image gave.

    Attributes:
        pairs: In order of growing contexts.
        context: The last context.
        counts: Of sentences by label ("positive", "negative", "unused"), "pairs", "steps", and words of both sides.
    """

    pairs: list[PreferencePair]
    context: str
    counts: Counter[str]


class SentinelDataBuilder:
    """Builds pairs of sentences without labels: a model samples, detectors vote, good sentences become context.

    Args:
        generate_sentences: Samples from the model that is to be trained.
        extract_objects: Objects that a text names, such as an `ObjectTable`.
        detectors: Two or more, of different build.
        config: Numbers.

    Raises:
        ValueError: there is no detector. A single one is warned about: its mistakes become truth.
    """

    def __init__(
        self,
        generate_sentences: SentenceGenerator,
        extract_objects: Callable[[str], Sequence[str]],
        detectors: Sequence[Detector],
        config: SentinelConfig | None = None,
    ) -> None:
        if not detectors:
            raise ValueError("detectors is empty; use two or more")
        if len(detectors) == 1:
            warnings.warn("one detector alone: its mistakes become truth; use two of different build", stacklevel=2)
        self.generate_sentences, self.extract_objects = generate_sentences, extract_objects
        self.detectors, self.config = tuple(detectors), config or SentinelConfig()

    def build(self, image: Any, question: str, *, image_id: str = "", image_path: str = "") -> Built:
        """Sample sentence by sentence; at most one pair for each context."""
        jury, context, pairs, counts = Jury(image, self.detectors), "", [], Counter[str]()
        for step in range(self.config.max_sentences):
            counts["steps"] += 1
            pool = self._sample(image, question, context, jury, (image_id, step))
            counts.update(judged.label for judged in pool)
            good = [j for j in pool if j.label == "positive"]
            bad = max((j for j in pool if j.label == "negative"), key=lambda j: j.hallucinated, default=None)
            coherent = [j for j in good if j.coherent]
            best = max(coherent or good, key=lambda j: j.factual, default=None)
            if best is None:
                break
            if bad is not None and (best.coherent or not context or not self.config.require_coherent):
                pairs.append(
                    PreferencePair(
                        image_id=image_id,
                        image_path=image_path,
                        question=question,
                        context=context,
                        y_win=best.text,
                        y_lose=bad.text,
                        win_ended=best.ended,
                        lose_ended=bad.ended,
                    )
                )
                counts += Counter(pairs=1, win_words=len(best.text.split()), lose_words=len(bad.text.split()))
            context = f"{context} {best.text}".strip()
            if best.ended:
                break
        return Built(pairs=pairs, context=context, counts=counts)

    def _sample(self, image: Any, question: str, context: str, jury: Jury, where: tuple[str, int]) -> list[Judged]:
        """Different sentences with their labels; sampled again while none of them is good."""
        pool: dict[str, Judged] = {}
        for attempt in range(1 + self.config.retries):
            seed = seed_of(self.config.seed, *where, attempt)
            for text, ended in self.generate_sentences(image, question, context, n=self.config.n_candidates, seed=seed):
                if text.strip() and text not in pool:
                    pool[text] = judge_sentence(text, context, self.extract_objects, jury, ended=ended)
            if any(j.label == "positive" for j in pool.values()):
                break
        return list(pool.values())

    def build_file(self, images: Iterable[tuple[str, Any, str]], path: str | Path) -> Counter[str]:
        """Build pairs of many images into a file; called again after a break, it goes on where it was.

        What is finished is kept beside the file, in ``<path>.journal``, until the file is whole.

        Args:
            images: (image_id, image, question) of each; an image that is done is not opened if it is a function, which
                is called without arguments when it is needed.
            path: Of the file, JSON, one pair a line.

        Returns:
            Sums of the counts of `Built`.
        """
        journal = Path(f"{path}.journal")
        done = _read_journal(journal, self.config)
        counts: Counter[str] = Counter()
        pairs: list[PreferencePair] = []
        with journal.open("a", encoding="utf-8") as file:
            if not done and not journal.stat().st_size:
                file.write(json.dumps(self.config.to_dict()) + "\n")
            for image_id, image, question in images:
                held = done.get(image_id)
                if held is None:
                    built = self.build(image() if callable(image) else image, question, image_id=image_id)
                    held = {"id": image_id, "pairs": [p.to_dict() for p in built.pairs], "counts": dict(built.counts)}
                    file.write(json.dumps(held) + "\n")
                    file.flush()
                pairs += [PreferencePair.from_dict(p) for p in held["pairs"]]
                counts.update(held["counts"])
        save_pairs(pairs, path)
        journal.unlink()
        return counts


def seed_of(*parts: Any) -> int:
    """A seed from 0 to 2^63 - 1 that depends on all parts and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def _read_journal(journal: Path, config: SentinelConfig) -> dict[str, Any]:
    """Finished images by id; a last line that was cut short is taken off the file.

    Raises:
        ValueError: the journal is of other settings.
    """
    if not journal.exists():
        return {}
    text = journal.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        journal.write_text(whole, encoding="utf-8")
    if not whole:
        return {}
    first, *lines = whole.splitlines()
    if json.loads(first) != config.to_dict():
        raise ValueError(f"{journal} was begun with other settings; use the same, or delete it")
    return {entry["id"]: entry for entry in map(json.loads, lines)}
