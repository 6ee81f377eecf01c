"""What was learnt, on disk in the form of diffusers' Custom Diffusion, and put into a pipeline."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from eff_kernels.edit import Handle, write_whole
from torch import Tensor

from eff_guidance.attencraft.config import Concept
from eff_guidance.attencraft.projections import train_projections
from eff_guidance.attencraft.words import add_words

WEIGHTS = "pytorch_custom_diffusion_weights.safetensors"
ABOUT = "concepts.json"
_VERSION = 1
_TAIL = {
    "to_k": "to_k_custom_diffusion", "to_v": "to_v_custom_diffusion", "to_q": "to_q_custom_diffusion",
    "to_out.0": "to_out_custom_diffusion.0",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ConceptAdapter:
    """Learnt concepts.

    Attributes:
        concepts: What they are called.
        weights: Projections by their name in the UNet or transformer, [out, in].
        words: By text encoder, the rows of the tokens, [concepts, width].
    """

    concepts: tuple[Concept, ...]
    weights: Mapping[str, Tensor]
    words: Mapping[str, Tensor]

    @property
    def num_numbers(self) -> int:
        """How many numbers it holds."""
        return sum(t.numel() for t in (*self.weights.values(), *self.words.values()))

    def save(self, folder: str | Path) -> None:
        """Write a folder.

        Projections of a UNet go under the names that ``unet.load_attn_procs`` of diffusers reads, each token of the
        first text encoder into a file that ``load_textual_inversion`` reads. ``concepts.json`` tells the rest.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        held = {_out(name): tensor.detach().cpu().contiguous().clone() for name, tensor in self.weights.items()}
        if any("attn2" in name for name in held):  # diffusers wants to hear of every processor
            for name in list(held):
                first = f"{name.partition('.attn2')[0]}.attn1.processor"
                held[first] = torch.empty(0)
        write_whole(folder / WEIGHTS, lambda file: save_file(held, file))
        for part, rows in self.words.items():
            for concept, row in zip(self.concepts, rows.detach().cpu(), strict=True):
                one = {concept.token: row.contiguous().clone()}
                write_whole(folder / _word_file(concept, part), functools.partial(save_file, one))
        about = {
            "version": _VERSION,
            "concepts": [{"token": c.token, "init_word": c.init_word, "words": c.words} for c in self.concepts],
            "encoders": list(self.words),
        }
        write_whole(folder / ABOUT, lambda file: Path(file).write_text(json.dumps(about, indent=2) + "\n"))

    @classmethod
    def load(cls, folder: str | Path) -> ConceptAdapter:
        """Read what `save` wrote.

        Raises:
            ValueError: the folder is of a version that this code does not know.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        about = json.loads((folder / ABOUT).read_text())
        if about.get("version") != _VERSION:
            raise ValueError(f"{folder} holds concepts of version {about.get('version')!r}; this reads {_VERSION}")
        concepts = tuple(Concept(**c) for c in about["concepts"])
        weights = {_in(n): t for n, t in load_file(folder / WEIGHTS).items() if t.numel()}
        words = {
            part: torch.stack([load_file(folder / _word_file(c, part))[c.token] for c in concepts])
            for part in about["encoders"]
        }
        return cls(concepts, weights, words)


def apply_concepts(pipe: Any, adapter: ConceptAdapter) -> Handle:
    """Put learnt concepts into a pipeline, so that its prompts may name them.

    Returns:
        A handle; ``remove()`` gives the pipeline back.

    Raises:
        ValueError: the adapter does not fit the pipeline.
    """
    model = denoiser(pipe)
    words = add_words(pipe, adapter.concepts)
    try:
        if set(words.rows) != set(adapter.words):
            raise ValueError(
                f"the adapter holds words for {sorted(adapter.words)}, the pipeline has {sorted(words.rows)}"
            )
        which = _kinds(adapter.weights)
        handle, layers = train_projections(model, which)
        try:
            if set(layers) != set(adapter.weights):
                odd = sorted(set(layers) ^ set(adapter.weights))
                raise ValueError(f"the adapter and {type(model).__name__} differ in {odd[:4]}")
            with torch.no_grad():
                for name, layer in layers.items():
                    layer.weight.copy_(_shaped(adapter.weights[name], layer.weight, name))
                for part, rows in words.rows.items():
                    rows.copy_(_shaped(adapter.words[part], rows, part))
        except Exception:
            handle.remove()
            raise
    except Exception:
        words.remove()
        raise
    for parameter in (*(layer.weight for layer in layers.values()), *words.rows.values()):
        parameter.requires_grad_(False)
    handle.on_remove(words.remove)
    return handle


def denoiser(pipe: Any) -> Any:
    """The UNet or transformer of a pipeline.

    Raises:
        ValueError: it has neither.
    """
    model = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if model is None:
        raise ValueError(f"{type(pipe).__name__} has neither unet nor transformer")
    return model


def _shaped(tensor: Tensor, like: Tensor, name: str) -> Tensor:
    if tensor.shape != like.shape:
        raise ValueError(f"{name}: the adapter has {list(tensor.shape)}, the model {list(like.shape)}")
    return tensor


def _kinds(names: Sequence[str] | Mapping[str, Tensor]) -> list[Any]:
    tails = {"to_k": "k", "add_k_proj": "k", "to_v": "v", "add_v_proj": "v", "to_q": "q", "to_out.0": "out"}
    found = {kind for name in names for tail, kind in tails.items() if name.endswith("." + tail)}
    return [kind for kind in ("k", "v", "q", "out") if kind in found]


def _word_file(concept: Concept, part: str) -> str:
    plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in concept.token)
    return f"{plain}{part.removeprefix('text_encoder')}.safetensors"


def _out(name: str) -> str:
    for own, theirs in _TAIL.items():
        if name.endswith("attn2." + own):
            return f"{name.removesuffix('.' + own)}.processor.{theirs}.weight"
    return f"{name}.weight"


def _in(name: str) -> str:
    name = name.removesuffix(".weight")
    for own, theirs in _TAIL.items():
        if name.endswith(f".processor.{theirs}"):
            return f"{name.removesuffix(f'.processor.{theirs}')}.{own}"
    return name
