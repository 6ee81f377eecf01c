"""Searching heads by the judge, and learning concepts from one picture: longer work of the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eff_studio.engine import StudioModel
from eff_studio.engine.model import EMBEDDED

# The embedded model is small; with these settings its maps of attention tell objects apart (bench of AttenCraft).
_COLLAGES: dict[str, Any] = {
    "template": "a {} on a white background", "learning_rate": 1e-3, "train": ("k", "v", "out"), "threshold": 0.05,
    "mask_time": (0.1, 0.2), "blocks": tuple(f"transformer_blocks.{i}.*" for i in range(2, 6)),
}  # fmt: skip


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
        embedded = model.name == EMBEDDED
        reader, more = (reader_of_collages(model.pipe), _COLLAGES) if embedded else (None, {})
        trainer = AttenCraftTrainer(model.pipe, latents, concepts, AttenCraftConfig(steps=steps, **more), reader=reader)
    except (OSError, Rejected, ValueError, TypeError) as error:
        print(f"eff-studio: {error}", file=sys.stderr)  # noqa: T201 - a command's answer
        return 1
    try:
        for _ in track(range(steps), "learning", transient=True):
            trainer.step()
        trainer.adapter().save(out)
    except ValueError as error:
        print(f"eff-studio: {error}", file=sys.stderr)  # noqa: T201 - a command's answer
        return 1
    finally:
        trainer.remove()
    print(out)  # noqa: T201 - a command's answer
    return 0


def reader_of_collages(pipe: Any) -> Any:
    """How the embedded model reads prompts, with gradients to its words (see `eff_guidance.attencraft.Reading`)."""
    import torch
    from eff_embedded.diffusion.prompts import LENGTH, pack
    from eff_guidance.attencraft import Reading

    mean, std = (torch.tensor(pipe.config[key]) for key in ("prompt_mean", "prompt_std"))

    def read(prompt: str) -> Reading:
        ids = pipe.tokenizer(prompt).input_ids
        where = pipe.text_encoder.device
        states = pipe.text_encoder(input_ids=torch.tensor([ids], device=where), use_cache=False).last_hidden_state[0]
        found = pack([states], mean.to(where), std.to(where))
        names = pipe.tokenizer.convert_ids_to_tokens(ids)
        arguments = {"encoder_hidden_states": found.tokens, "pooled_projections": found.pooled}
        return Reading(arguments, (*names, *[""] * (LENGTH - len(ids))))

    return read


def _concept(kind: Any, word: str) -> Any:
    token, equals, init = word.partition("=")
    if not equals:
        raise ValueError(f"{word!r}; wanted a new word and a known one, such as '<rex>=dog'")
    return kind(token=token, init_word=init)
