"""Settings of attention calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from eff_kernels.edit import Settings

Threshold = tuple[Literal["absolute", "relative"], float]
Spare = Literal["first_token", "first_sink"]
Decode = Literal["running", "prefill_sinks", "off"]
Path = Literal["auto", "explicit", "fast"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ACTConfig(Settings):
    """Which heads are calibrated, what counts as a sink, and how much of it stays.

    Attributes:
        beta: Factor of the weights of sinks, 0 to 1; at 1 nothing is changed.
        threshold: A key is a sink if the mean weight that it gets is more than this: ``("absolute", tau)``, or
            ``("relative", alpha)`` for alpha divided by the number of tokens so far.
        layers: Layers to treat, as a slice ("2:-1": all but the first two and the last) or as indices. It bounds
            ``heads="all"`` alone.
        heads: Query heads to treat by layer, or "all".
        spare: What is never treated: "first_token", the first token that is no padding, or "first_sink", the first key
            above the threshold whichever it is (the published code). The first token is spared in both cases.
        min_rows: Queries that must have seen a key before it can be a sink. At 1 the last token is one as soon as it
            looks at itself.
        decode: From which queries the means are while tokens are generated: "running", all up to the current one;
            "prefill_sinks", those of the prompt; "off": only the prompt is treated.
        path: "explicit" changes the weights themselves, in float32; "fast" corrects the host's output by the sinks
            alone; "auto" takes the fast one for prompts with few sinks where the layer allows it.
        model_hash: Of the model that the heads were chosen for, see `model_hash`; another one is warned about.
    """

    beta: float = 0.4
    threshold: Threshold = ("absolute", 0.1)
    layers: str | tuple[int, ...] = "2:-1"
    heads: Literal["all"] | Mapping[int, tuple[int, ...]] = "all"
    spare: Spare = "first_token"
    min_rows: int = 1
    decode: Decode = "running"
    path: Path = "auto"
    model_hash: str | None = None

    def check(self) -> None:
        """See `Settings`."""
        check_beta(self.beta)
        check_threshold(self.threshold)
        if self.min_rows < 1:
            raise ValueError(f"min_rows={self.min_rows}; use at least 1")
        if isinstance(self.layers, str):
            span(self.layers)

    def chosen(self, num_layers: int, num_heads: int, allowed: Mapping[int, str]) -> dict[int, tuple[int, ...]]:
        """Heads to treat, by layer.

        Args:
            num_layers: Layers of the model.
            num_heads: Query heads of a layer.
            allowed: Layers that cannot be treated, with the kind that they have instead of full attention.

        Raises:
            ValueError: there is no such layer or head, none is left, or a layer that was named cannot be treated.
        """
        if self.heads != "all":
            named = {layer: tuple(sorted(set(heads))) for layer, heads in sorted(self.heads.items())}
            if wrong := sorted(set(named) - set(range(num_layers))):
                raise ValueError(f"heads names layers {wrong}; the model has 0..{num_layers - 1}")
            for layer, heads in named.items():
                if heads and not 0 <= heads[0] <= heads[-1] < num_heads:
                    raise ValueError(f"heads[{layer}]={heads}; the query heads are 0..{num_heads - 1}")
                if heads and layer in allowed:
                    raise ValueError(f"layer {layer} has {allowed[layer]}; sinks are calibrated in full attention")
            return {layer: heads for layer, heads in named.items() if heads}
        if isinstance(self.layers, str):
            layers = [i for i in range(num_layers)[span(self.layers)] if i not in allowed]
        else:
            layers = sorted(set(self.layers))
            if layers and not 0 <= layers[0] <= layers[-1] < num_layers:
                raise ValueError(f"layers={self.layers}; the model has 0..{num_layers - 1}")
            if wrong := [i for i in layers if i in allowed]:
                raise ValueError(f"layer {wrong[0]} has {allowed[wrong[0]]}; sinks are calibrated in full attention")
        if not layers:
            raise ValueError(f"layers={self.layers!r} leaves none of the {num_layers} layers with full attention")
        return {layer: tuple(range(num_heads)) for layer in layers}


def check_beta(beta: float) -> None:
    """Refuse a beta outside of [0, 1]."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta={beta}; use 0 to 1")


def check_threshold(threshold: Threshold) -> None:
    """Refuse an unknown kind, and a limit that is not positive."""
    kind, limit = threshold
    if kind not in ("absolute", "relative"):
        raise ValueError(f"threshold={threshold}; its kind is 'absolute' or 'relative'")
    if not limit > 0:
        raise ValueError(f"threshold={threshold}; the limit must be positive")


def span(text: str) -> slice:
    """A slice from its text, such as "2:-1".

    Raises:
        ValueError: it is none.
    """
    parts = text.split(":")
    try:
        if len(parts) not in (2, 3):
            raise ValueError
        return slice(*(int(p) if p.strip() else None for p in parts))
    except ValueError:
        raise ValueError(f"layers={text!r}; use a slice such as '2:-1', or indices") from None
