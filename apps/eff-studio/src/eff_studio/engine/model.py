"""Loading the model that the studio draws with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

EMBEDDED = "collage-diffusion"


@dataclass(frozen=True, kw_only=True)
class StudioModel:
    """A pipeline and what a page needs to know of it.

    Attributes:
        name: As the user gave it.
        pipe: The pipeline of diffusers.
        width: Points of a picture unless asked otherwise.
        height: Points.
        multiple: Sides must be multiples of this.
        heads: Heads of each layer.
        words: What the model knows, if it knows little; otherwise empty.
        styles: Folder with style adapters, or None.
        concepts: Folder with learnt concepts, or None.
        resizable: Whether other sizes than its own work.
        hard_blocks: LayerBind's hard-binding blocks; "auto" scales those of large models to the depth.
    """

    name: str
    pipe: Any
    width: int
    height: int
    multiple: int
    heads: tuple[int, ...]
    words: tuple[str, ...] = ()
    styles: Path | None = None
    concepts: Path | None = None
    resizable: bool = True
    hard_blocks: Literal["auto"] | tuple[int, ...] = "auto"

    def facts(self) -> dict[str, Any]:
        """What a page needs to know, as JSON."""
        return {
            "model": self.name,
            "width": self.width,
            "height": self.height,
            "multiple": self.multiple,
            "resizable": self.resizable,
            "heads": list(self.heads),
            "words": list(self.words),
            "styles": folders(self.styles),
            "concepts": folders(self.concepts),
        }


def folders(path: Path | None) -> list[str]:
    """Names of the folders inside of one."""
    return sorted(p.name for p in path.iterdir() if p.is_dir()) if path is not None and path.is_dir() else []


def load_model(
    name: str = EMBEDDED, *, dtype: str = "auto", device: str = "auto", data: Path | None = None
) -> StudioModel:
    """Load the embedded model, or any SD3 or FLUX pipeline of diffusers by folder or name.

    Args:
        name: "collage-diffusion", a folder, or a name on the hub.
        dtype: "auto" is float32 on a CPU and bfloat16 on a GPU; or a name of torch, such as "float16".
        device: "auto" takes a GPU where there is one.
        data: Folder of the studio, with ``styles`` and ``concepts`` in it.

    Raises:
        ValueError: the dtype is unknown.
        TypeError: the pipeline's model is neither of SD3's nor of FLUX's class.
    """
    from eff_guidance.head_guidance import list_layers

    where = device_for(device)
    kind = _dtype(dtype, where)
    words: tuple[str, ...] = ()
    if name == EMBEDDED:
        from eff_embedded.diffusion import load_collage_diffusion
        from eff_embedded.judge import load_judge

        pipe: Any = load_collage_diffusion(dtype=kind)
        words = tuple(load_judge().objects)
    else:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(name, torch_dtype=kind)
    transformer: Any = getattr(pipe, "transformer", None)
    if type(transformer).__name__ not in ("SD3Transformer2DModel", "FluxTransformer2DModel"):
        raise TypeError(f"{name} draws with {type(transformer).__name__}; the studio works with SD3 and FLUX")
    pipe = pipe.to(where)
    pipe.set_progress_bar_config(disable=True)
    flux = type(transformer).__name__.startswith("Flux")
    token = pipe.vae_scale_factor * (2 if flux else transformer.config.patch_size)
    side = pipe.default_sample_size * pipe.vae_scale_factor
    return StudioModel(
        name=name,
        pipe=pipe,
        width=side,
        height=side,
        multiple=token,
        heads=tuple(layer.num_heads for layer in list_layers(transformer)),
        words=words,
        styles=None if data is None else data / "styles",
        concepts=None if data is None else data / "concepts",
        resizable=name != EMBEDDED,
        # Scaled to eight blocks the list of large models would be nearly all of them.
        hard_blocks=(0,) if name == EMBEDDED else "auto",
    )


def device_for(name: str) -> str:
    """The device that a name stands for: "auto" is a GPU where there is one."""
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(name: str, device: str) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype={name!r}; wanted 'auto' or a floating type of torch, such as 'bfloat16'")
    return found
