"""The same idea without training: of several next sentences, keep one that invents nothing (SENTINEL, appendix A.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from eff_adapters.sentinel.build import SentenceGenerator, seed_of
from eff_adapters.sentinel.config import SentinelConfig
from eff_adapters.sentinel.votes import Detector, Jury, judge_sentence


def intervene(
    image: Any,
    question: str,
    generate_sentences: SentenceGenerator,
    extract_objects: Callable[[str], Sequence[str]],
    detectors: Sequence[Detector],
    config: SentinelConfig | None = None,
) -> str:
    """Describe an image sentence by sentence, each the one of ``n_candidates`` with the fewest invented objects.

    Among those, the one that names most objects that are there comes first, and then the first sampled. It takes one
    detector or more, and several times the time of plain sampling.

    Raises:
        ValueError: there is no detector.
    """
    if not detectors:
        raise ValueError("detectors is empty; use one or more")
    config = config or SentinelConfig()
    jury, context = Jury(image, detectors), ""
    for step in range(config.max_sentences):
        seed = seed_of(config.seed, "intervene", step)
        sampled = generate_sentences(image, question, context, n=config.n_candidates, seed=seed)
        judged = [
            judge_sentence(text, context, extract_objects, jury, ended=ended) for text, ended in sampled if text.strip()
        ]
        if not judged:
            break
        best = min(judged, key=lambda j: (j.hallucinated, -j.factual))
        context = f"{context} {best.text}".strip()
        if best.ended:
            break
    return context
