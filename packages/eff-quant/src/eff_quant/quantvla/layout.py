"""Which layers of a policy are quantised: the selective layout of QuantVLA (section 4.1), as patterns of names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from eff_kernels.edit import Settings, matches
from torch import nn

Preset = Literal["gr00t_n1_5", "pi05", "dit"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantLayout(Settings):
    """Patterns (see `eff_kernels.matches`) of the linear layers to quantise and of the attention to calibrate.

    A layout is also a predicate ``layout(name, module)``, so that it can be given to `quantize_` as ``where``.

    Attributes:
        include: Linear layers to quantise. Each pattern has to fit at least one of a model's, so that a model whose
            names have changed is not quantised by half without a word.
        exclude: Layers to leave, or modules to leave with all that is inside.
        attention: Attention modules whose scales are matched (`collect_attention_stats`).
        bits: Bits of the weights and of the activations.
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    bits: tuple[int, int] = (4, 8)

    def check(self) -> None:
        """See the class."""
        if not self.include:
            raise ValueError("include=(); name at least one pattern of layers to quantise")
        if self.bits not in ((4, 8), (8, 8)):
            raise ValueError(f"bits={self.bits}; use (4, 8) or (8, 8), for weights and activations")

    @classmethod
    def preset(cls, name: Preset) -> QuantLayout:
        """A layout for a known family of models.

        ``"gr00t_n1_5"``: all linear layers of the language model and the MLPs of the action head (84 + 32).
        ``"pi05"``: the same for pi0 and pi0.5 of openpi and LeRobot (126 + 54). ``"dit"``: the MLPs of a diffusion
        transformer as diffusers names them.

        Raises:
            ValueError: no preset of that name.
        """
        if name not in PRESETS:
            raise ValueError(f"no layout {name!r}; use one of {', '.join(map(repr, get_args(Preset)))}")
        return PRESETS[name]

    def __call__(self, name: str, module: object = None) -> bool:
        """Whether a layer of this name is to be quantised."""
        return any(matches(name, p) for p in self.include) and not self.excluded(name)

    def excluded(self, name: str) -> bool:
        """Whether a pattern of ``exclude`` fits this name or that of a module around it."""
        parts = name.split(".")
        around = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        return any(matches(n, p) for n in around for p in self.exclude)

    def select_names(self, names: Iterable[str]) -> list[str]:
        """The names of the layers that the layout quantises, in their order.

        Raises:
            ValueError: a pattern of ``include`` fits no name; the message names the pattern.
        """
        names = list(names)
        chosen = [n for n in names if self(n)]
        idle = [p for p in self.include if not any(matches(n, p) for n in chosen)]
        if idle:
            patterns = ", ".join(map(repr, idle))
            raise ValueError(f"none of the {len(names)} linear layers fits {patterns}: {_some(names)}")
        return chosen

    def linears(self, model: nn.Module) -> list[str]:
        """The linear layers of a model to quantise, by name.

        Raises:
            ValueError: see `select_names`.
        """
        return self.select_names(name for name, m in model.named_modules() if isinstance(m, nn.Linear))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "none at all"
    return f"{shown}, ..." if len(names) > 3 else shown


_LLM = r"(q|k|v|o|gate|up|down)_proj"
_EXCLUDE = ("vision", "vision_tower", "vision_model", "radio", "norm", "ln", "layernorm", "embed", "lm_head", "attn1")

PRESETS: dict[str, QuantLayout] = {
    "gr00t_n1_5": QuantLayout(
        include=(
            rf"re:(.*\.)?language_model\..*\.{_LLM}",
            r"re:(.*\.)?action_head\.model\.transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)",
        ),
        exclude=_EXCLUDE,
        attention=(r"re:(.*\.)?action_head\.model\.transformer_blocks\.\d+\.attn1",),
    ),
    "pi05": QuantLayout(
        include=(
            rf"re:(.*\.)?paligemma\.(.*\.)?language_model\..*\.{_LLM}",
            r"re:(.*\.)?gemma_expert\.model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
        ),
        exclude=_EXCLUDE,
        attention=(r"re:(.*\.)?gemma_expert\.model\.layers\.\d+\.self_attn",),
    ),
    "dit": QuantLayout(
        include=(r"re:(.*\.)?(transformer_)?blocks\.\d+\.(ff|ff_context|mlp)\.(net\.0\.proj|net\.2|fc1|fc2)",),
        attention=(r"re:(.*\.)?(transformer_)?blocks\.\d+\.(attn|attn1|attn2)",),
    ),
}
