"""Searching heads by the judge, and learning concepts from one picture: longer work of the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eff_studio.engine import StudioModel
from eff_studio.engine.model import EMBEDDED


def search_heads(
    model: StudioModel, prompts: Sequence[str], out: Path, *, rounds: int, heads: int, seeds: int, steps: int
) -> int:
    """Find heads whose damage guides best, by the judge of collages, and write them as JSON.

    An interrupted search goes on from its file.
    """
    from eff_guidance.head_guidance import HeadHunter, HeadHunterConfig, list_heads, pipeline_generator

    if model.name != EMBEDDED:
        print(  # noqa: T201 - a command's answer
            f"eff-studio: the judge reads pictures of {EMBEDDED} only; search for other models by "
            "eff_guidance.head_guidance.HeadHunter with a score of your own",
            file=sys.stderr,
        )
        return 1
    from eff_embedded.judge import load_judge

    judge = load_judge()

    def score(pictures: Sequence[Any], asked: list[str]) -> list[float]:
        found = []
        for reading, prompt in zip(judge(list(pictures)), asked, strict=True):
            wanted = [name for name in judge.objects if name in prompt]
            found.append(sum(name in reading.names for name in wanted) / max(1, len(wanted)))
        return found

    pairs = [(prompt, seed) for prompt in prompts for seed in range(seeds)]
    hunter = HeadHunter(
        pipeline_generator(model.pipe, num_inference_steps=steps),
        score,
        [prompt for prompt, _ in pairs],
        seeds=[seed for _, seed in pairs],
        config=HeadHunterConfig(rounds=rounds, heads_per_round=heads),
        heads=list_heads(model.pipe.transformer),
    )
    found = hunter.search(resume=out)
    found.save(out)
    for head in found.best():
        print(f"layer {head.layer} head {head.head}")  # noqa: T201 - a command's answer
    return 0


def learn(model: StudioModel, picture: Path, words: Sequence[str], out: Path, *, steps: int) -> int:
    """Learn the things on a picture, named "<word>=kind" such as "<rex>=dog", into a folder of concepts."""
    from eff_guidance.attencraft import AttenCraftConfig, AttenCraftTrainer, Concept, encode_latents
    from rich.progress import track

    from eff_studio.store.pictures import Rejected, read_picture

    try:
        concepts = [_concept(Concept, word) for word in words]
        image = read_picture(picture.read_bytes()).convert("RGB").resize((model.width, model.height))
        latents = encode_latents(model.pipe, image)
        trainer = AttenCraftTrainer(model.pipe, latents, concepts, AttenCraftConfig(steps=steps))
    except (OSError, Rejected, ValueError, TypeError) as error:
        print(f"eff-studio: {error}", file=sys.stderr)  # noqa: T201 - a command's answer
        return 1
    for _ in track(range(steps), "learning", transient=True):
        trainer.step()
    trainer.adapter().save(out)
    trainer.remove()
    print(out)  # noqa: T201 - a command's answer
    return 0


def _concept(kind: Any, word: str) -> Any:
    token, equals, init = word.partition("=")
    if not equals:
        raise ValueError(f"{word!r}; wanted a new word and a known one, such as '<rex>=dog'")
    return kind(token=token, init_word=init)
