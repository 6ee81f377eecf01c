"""How a model is loaded and run: one frozen config, which goes whole from the command line to the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

Quantize = Literal["auto", "int8", "int4", "nvfp4", "mxfp4", "fp8", "none"]
QUANTIZE = ("auto", "int8", "int4", "nvfp4", "mxfp4", "fp8", "none")
_VERSION = 1
_AT_LEAST_ONE = ("max_batch", "max_waiting", "max_waiting_tokens", "chunk")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Settings of an engine and of the model that it runs.

    Attributes:
        model: A folder in transformers' layout, a GGUF file, or the name of a model on the hub; None is the embedded
            model, and "smollm2-eyes" that model with eyes.
        quantize: Format of all projections: "int8" (LLM.int8()), "int4" (groups of 32), "nvfp4", "mxfp4" or "fp8"
            quantise float weights while loading, "none" takes weights as they are, "auto" takes a quantised folder and
            a GGUF file as they are, and float weights to int8. With int8 and int4 a float head goes to groups of 8
            bits; the embedding stays. Models that the lean decoder does not run go through transformers, without
            quantising.
        threshold: Outlier threshold of int8; 0 takes no outliers out. None is that of the folder where its weights are
            int8, else 6.
        max_model_len: Most tokens of a sequence; None is the model's own limit, if the cache has room for it.
        max_batch: Most sequences that run at once.
        max_waiting: Most requests in line behind them.
        max_waiting_tokens: Most prompt tokens in line.
        chunk: Prompt tokens per step; a longer prompt takes several steps, between which others go on decoding. Short
            pieces are no slower on a CPU and hold the others up for less long.
        kv_gib: Memory for keys and values, in GiB; taken as it fills.
        layer_reuse: Policy file of `eff_attention.layer_reuse`: long sequences decode with fewer keys in some layers.
        reuse_top_k: Keys that these layers attend to, instead of what the file says.
        reuse_min_len: Length from which on they do, instead of what the file says.
        reuse_selector: How the layers that they follow choose, instead of what the file says.
        adapters: Folders of LoRA adapters that PEFT wrote, or of mixtures of them, by the names that requests use.
        prefix_cache: Share keys between texts that begin alike, those of ended requests included; models that run
            through transformers do not.
        lookup: Tokens to guess from the text so far while one sequence runs alone; the answers stay the same. 0: none.

    Raises:
        ValueError: a value lies outside of its range, or settings do not fit each other.
    """

    model: str | None = None
    quantize: Quantize = "auto"
    threshold: float | None = None
    max_model_len: int | None = None
    max_batch: int = 16
    max_waiting: int = 64
    max_waiting_tokens: int = 65536
    chunk: int = 128
    kv_gib: float = 1.0
    layer_reuse: Path | None = None
    reuse_top_k: int | None = None
    reuse_min_len: int | None = None
    reuse_selector: Literal["exact", "pooled"] | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    prefix_cache: bool = True
    lookup: int = 0

    def __post_init__(self) -> None:
        if self.quantize not in QUANTIZE:
            raise ValueError(f"quantize must be one of {', '.join(QUANTIZE)}, got {self.quantize!r}")
        if self.threshold is not None and not self.threshold >= 0:  # so that NaN fails
            raise ValueError(f"threshold must be 0 or more, got {self.threshold}")
        for name in _AT_LEAST_ONE:
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ValueError(f"max_model_len must be 1 or more, got {self.max_model_len}")
        if not self.kv_gib > 0:
            raise ValueError(f"kv_gib must be above 0, got {self.kv_gib}")
        if self.lookup < 0:
            raise ValueError(f"lookup must be 0 or more, got {self.lookup}")
        reuse = (self.reuse_top_k, self.reuse_min_len, self.reuse_selector)
        if self.layer_reuse is None and any(x is not None for x in reuse):
            raise ValueError("reuse_top_k, reuse_min_len and reuse_selector need a policy in layer_reuse")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them, with the version of this form."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values["layer_reuse"] = None if self.layer_reuse is None else str(self.layer_reuse)
        values["adapters"] = {name: str(folder) for name, folder in self.adapters.items()}
        return {"version": _VERSION, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild the settings from `to_dict`; what is left out takes its default.

        Raises:
            ValueError: a version that this code does not know, or unknown entries.
        """
        given = dict(values)
        if (version := given.pop("version", _VERSION)) != _VERSION:
            raise ValueError(f"EngineConfig of version {version!r}; this release reads version {_VERSION}")
        if unknown := sorted(set(given) - {f.name for f in fields(cls)}):
            raise ValueError(f"EngineConfig has no {', '.join(unknown)}")
        if given.get("layer_reuse") is not None:
            given["layer_reuse"] = Path(given["layer_reuse"])
        given["adapters"] = {name: Path(folder) for name, folder in (given.get("adapters") or {}).items()}
        return cls(**given)
