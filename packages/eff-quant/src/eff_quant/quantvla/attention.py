"""The parts of an attention module that scales act on, whatever the library that it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

# First name found wins. diffusers, transformers, and what people write.
_QUERY = ("to_q", "q_proj", "query", "wq", "q")
_QUERY_NORM = ("norm_q", "q_norm", "query_norm", "q_layernorm")
_OUT = ("to_out", "o_proj", "out_proj", "wo", "out", "proj", "dense")
_HEADS = ("heads", "num_heads", "num_attention_heads", "n_heads", "n_head")


@dataclass(frozen=True, slots=True)
class AttentionParts:
    """Parts of one attention module.

    Attributes:
        queries: Query projections, each with the norm behind it or None; two in the joint attention of SD3 and Flux.
        out: The output projection of the main stream.
        heads: Number of query heads, None where the module does not say.
        head_axis: Axis of the heads in the input of a query norm that is shared by all heads.
    """

    queries: tuple[tuple[nn.Module, nn.Module | None], ...]
    out: nn.Module
    heads: int | None
    head_axis: int


def attention_parts(name: str, module: nn.Module) -> AttentionParts:
    """Find the projections of an attention module.

    Raises:
        ValueError: no query or output projection under a known name, such as where q, k and v are fused.
    """
    query, out = _child(module, _QUERY), _child(module, _OUT)
    if isinstance(out, nn.ModuleList | nn.Sequential):
        out = out[0]
    if query is None or out is None:
        held = ", ".join(child for child, _ in module.named_children()) or "nothing"
        missing = f"query projection ({', '.join(_QUERY)})" if query is None else f"output ({', '.join(_OUT)})"
        fused = "; unfuse its projections first" if query is None else ""
        raise ValueError(f"{name}: a {type(module).__name__} holds {held}, but no {missing}{fused}")
    queries = [(query, _child(module, _QUERY_NORM))]
    added = _child(module, ("add_q_proj",))
    if added is not None:
        queries.append((added, _child(module, ("norm_added_q",))))
    # diffusers' Attention brings the heads forward before it normalises, all others after.
    return AttentionParts(tuple(queries), out, _heads(module), -3 if type(module).__name__ == "Attention" else -2)


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((m for n in names if isinstance(m := getattr(module, n, None), nn.Module)), None)


def _heads(module: nn.Module) -> int | None:
    config: Any = getattr(module, "config", None)
    found = (getattr(owner, n, None) for owner in (module, config) for n in _HEADS)
    return next((value for value in found if isinstance(value, int)), None)
