"""Steering of single requests: eff's rules of attention act on those rows of a batch that ask for them.

All rows share the projections and the paged kernel. Where a rule changes attention, the row's keys are gathered from
its pages and the rule gets the call as it gets one of a transformers model, with the kernel's output as what the host
computed: rows without rules, and calls in which a rule finds nothing to change, keep that output bit for bit. What a
rule knows of a sequence stays with that sequence, so that no row of a batch meets another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from eff_attention.contrastive_focus.record import default_layers
from eff_attention.grounded_attention import PAIConfig, PAINTConfig
from eff_attention.head_reinforcement import VHRConfig
from eff_attention.sink_calibration import ACTConfig
from eff_attention.visual_sinks import VARConfig
from eff_attention.visual_sinks.dims import dims_of_sinks, random_prompts
from eff_kernels.edit import Settings
from torch import Tensor

from eff_serve.engine.steered import Steered

if TYPE_CHECKING:
    from eff_serve.engine.decoder import Decoder
    from eff_serve.engine.watch import PictureWatch
    from eff_serve.pictures.prompt import PromptPictures

METHODS: dict[str, type[Settings]] = {
    "act": ACTConfig,
    "var": VARConfig,
    "vhr": VHRConfig,
    "paint": PAINTConfig,
    "pai": PAIConfig,
}
OF_TEXT = ("act",)
OF_PICTURES = ("var", "vhr", "paint", "pai")
CARVE = "carve"
"""A second look at a picture: answers that are watched, and no rule in this one; see `PictureWatch`."""

# The first sees the host's call first and its result last: heads are scaled at the end, logits raised before weights
# are moved, and calibration sees the weights that the others leave.
_ORDER = ("vhr", "paint", "pai", "var", "act")


@dataclass(frozen=True, slots=True, kw_only=True)
class Steering(Settings):
    """What a request asks for: settings of the methods that it wants, None for the others.

    Attributes:
        act: Later attention sinks are scaled down.
        var: Heads that look at a picture spend on its content what they spend on its sinks.
        vhr: Heads whose output depends on the picture are strengthened.
        paint: Attention to informative tokens of pictures is raised.
        pai: Attention to all tokens of pictures is raised.
    """

    act: ACTConfig | None = None
    var: VARConfig | None = None
    vhr: VHRConfig | None = None
    paint: PAINTConfig | None = None
    pai: PAIConfig | None = None

    def check(self) -> None:
        """See `Settings`."""
        if self.paint is not None and self.pai is not None:
            raise ValueError("paint and pai both raise attention to pictures; give one of them")
        if self.act is not None and self.act.model_hash is not None:
            raise ValueError("act.model_hash is for heads that were searched elsewhere; leave it out")
        if self.vhr is not None and self.vhr.reference != "plain":
            raise ValueError(f"vhr.reference={self.vhr.reference!r}; a server compares with 'plain'")
        if self.paint is not None:
            default = PAINTConfig()
            for name in ("local_layer", "summary_layer", "saliency", "spatial_ratio"):
                if (value := getattr(self.paint, name)) != getattr(default, name):
                    raise ValueError(f"paint.{name}={value!r}; a server supports only {getattr(default, name)!r}")

    @property
    def names(self) -> tuple[str, ...]:
        """The methods that are asked for."""
        return tuple(name for name in (*OF_TEXT, *OF_PICTURES) if getattr(self, name) is not None)


class Steerer:
    """What a decoder's requests may ask for, and the rules for each that asks."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._first_tokens: Tensor | None = None

    @property
    def takes(self) -> tuple[str, ...]:
        """Methods that a request may ask for."""
        if self._decoder.reuse is not None:  # its layers see a part of the keys, which rules would not know
            return ()
        return OF_TEXT if self._decoder.behind_pictures is None else (*OF_TEXT, *OF_PICTURES, CARVE)

    def check(
        self, steering: Steering | None, pictures: PromptPictures | None, watch: PictureWatch | None = None
    ) -> None:
        """Refuse what cannot be done for a prompt.

        Raises:
            ValueError: the model or the prompt has no such part, or a setting does not fit the model.
        """
        if watch is not None:
            self._check_watch(watch, pictures)
        if steering is None:
            return
        c = self._decoder.config
        if self._decoder.reuse is not None:
            raise ValueError(
                "steering does not work beside layer reuse: its layers attend to a part of the keys, and rules of "
                "attention need them all"
            )
        check_takes(steering, self.takes)
        for name in steering.names:
            if name in OF_PICTURES and pictures is None:
                raise ValueError(f"steering by {name!r} needs a picture in the prompt, and there is none")
        if steering.act is not None:
            steering.act.chosen(c.num_layers, c.num_heads, {})
        if steering.var is not None:
            steering.var.layers(c.num_layers)
            self._dims(steering.var)
        if steering.vhr is not None:
            steering.vhr.chosen(c.num_layers)
        for raised in (steering.paint, steering.pai):
            if raised is not None:
                raised.layers(c.num_layers)
                raised.gains(c.num_layers, c.num_heads)
        if steering.paint is not None and (pictures is None or pictures.saliency is None):
            raise ValueError("steering by 'paint' needs a vision tower whose attention can be read; use 'pai'")

    def _check_watch(self, watch: PictureWatch, pictures: PromptPictures | None) -> None:
        count = self._decoder.config.num_layers
        if CARVE not in self.takes or pictures is None:
            raise ValueError("watching where an answer looks needs a picture, and a model whose attention is in reach")
        if wrong := [i for i in watch.layers or () if not -count <= i < count]:
            raise ValueError(f"layers {wrong} cannot be watched; the model has 0..{count - 1}")

    def begin(
        self,
        steering: Steering | None,
        prompt: Tensor,
        pictures: PromptPictures | None,
        adapter: int = -1,
        watch: PictureWatch | None = None,
    ) -> Steered:
        """The rules of one sequence, before its first token is read.

        Args:
            steering: What it asks for, after `check`.
            prompt: Its prompt, int64 [T].
            pictures: The prompt's pictures.
            adapter: Number of its adapter.
            watch: Notes where it looks, after `check`.
        """
        c = self._decoder.config
        places = None if pictures is None else pictures.places
        steered = Steered(c.num_layers, prompt.numel(), places)
        if watch is not None:
            assert places is not None
            chosen = default_layers(c.num_layers) if watch.layers is None else watch.layers
            steered.add_watch(watch, tuple(i % c.num_layers for i in chosen), places)
        for name in _ORDER if steering is not None else ():
            config = getattr(steering, name)
            if name == "vhr" and config is not None and steering is not None:
                steered.add_vhr(config, self._without_pictures(steering.act, prompt, places, adapter))
            elif name in ("paint", "pai") and config is not None:
                saliency = None if pictures is None else pictures.saliency
                steered.add_raised(config, saliency, config.gains(c.num_layers, c.num_heads))
            elif name == "var" and config is not None:
                dims, tau = self._dims(config)
                steered.add_var(config, dims, tau)
            elif name == "act" and config is not None:
                steered.add_act(config, config.chosen(c.num_layers, c.num_heads, {}))
        return steered

    def measure(self) -> None:
        """Find out in which dimensions sinks are huge; what `check` would do when it is asked first."""
        if self._first_tokens is None:
            c = self._decoder.config
            middle = slice(c.num_layers // 4, 3 * c.num_layers // 4 + 1)
            found = []
            for ids in random_prompts(c.vocab_size, None):
                rows: list[Tensor] = []
                self._decoder.look(ids, on_hidden=partial(_note_first, rows))
                found.append(torch.stack(rows)[middle])
            self._first_tokens = torch.stack(found)

    def _dims(self, config: VARConfig) -> tuple[tuple[int, ...], float]:
        """Dimensions of sinks and tau."""
        size = self._decoder.config.hidden_size
        tau = config.threshold(size)
        if config.dims != "auto":
            if max(config.dims) >= size:
                raise ValueError(f"var.dims={config.dims}; the model has 0..{size - 1}")
            return config.dims, tau
        self.measure()
        assert self._first_tokens is not None
        dims = tuple(dims_of_sinks(self._first_tokens, tau))
        if not dims:
            raise ValueError(f"no hidden dimension of this model is above tau={tau:.4g}; give var.dims, or a lower tau")
        return dims, tau

    def _without_pictures(
        self, act: ACTConfig | None, prompt: Tensor, places: Tensor | None, adapter: int
    ) -> dict[int, Tensor]:
        """What heads give at the prompt's last token when the tokens of pictures are left out, by layer [1, H, D]."""
        assert places is not None
        kept = torch.ones_like(prompt, dtype=torch.bool)
        kept[places] = False
        behind = (torch.arange(prompt.numel()) > places[0])[kept].nonzero().flatten()
        found: dict[int, Tensor] = {}
        c, calibrated = self._decoder.config, None
        if act is not None:
            calibrated = Steered(c.num_layers, int(kept.sum()), None)
            calibrated.add_act(act, act.chosen(c.num_layers, c.num_heads, {}))
        self._decoder.look(
            prompt[kept],
            on_output=lambda layer, out: found.update({layer: out[-1:].clone()}),
            behind=behind,
            adapter=adapter,
            steered=calibrated,
        )
        return found


def check_takes(steering: Steering, takes: tuple[str, ...]) -> None:
    """Refuse methods that a model does not take.

    Raises:
        ValueError: it does not; the message says what it takes.
    """
    for name in steering.names:
        if name not in takes:
            raise ValueError(not_taken(name, takes))


def not_taken(name: str, takes: tuple[str, ...]) -> str:
    """Says that a model does not take a method, and what it takes."""
    known = ", ".join(map(repr, takes)) or "no steering"
    return f"steering by {name!r} is not supported by this model; it supports {known}"


def _note_first(rows: list[Tensor], layer: int, hidden: Tensor) -> None:
    rows.append(hidden[0].clone())
