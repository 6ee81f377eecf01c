"""A use of a style: what holds for the calls of one thread inside of ``with style.use(...)``."""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eff_guidance.denoiser import current_call
from eff_guidance.pokefusion.adapter import StyleAdapter
from eff_guidance.pokefusion.layers import key_norm
from eff_guidance.together import Rows, current_layout, current_rows


@dataclass(frozen=True, eq=False)
class StyleUse:
    """How style acts.

    Attributes:
        weights: Share of each style, [1 or B, K].
        strength: Factor of all layers.
        layer_strength: Further factors, by name of a layer or the beginning of its name.
        steps: Share of the sampler's steps at which it begins and ends.
        mask: Where it acts, float [H, W] from 0 to 1, or None for everywhere.
        ratio: Scale of style over that of text in two-scale guidance.
        unconditional: Rows at the front of the batch that get no style; None asks ``pipe``.
        keep: Which of the other rows get it, bool [B], or None for all.
        pipe: The pipeline, for its scheduler and whether it guides.
        kept: Keys and values of style by layer, with what they were made of; None to rebuild them each time.
    """

    weights: Tensor
    strength: float = 1.0
    layer_strength: Mapping[str, float] = field(default_factory=dict)
    steps: tuple[float, float] = (0.0, 1.0)
    mask: Tensor | None = None
    ratio: float = 1.0
    unconditional: int | None = None
    keep: Tensor | None = None
    pipe: Any = None
    kept: dict[str, Any] | None = None

    def factor(self, name: str) -> float:
        """Strength in one layer, 0 outside of the window of steps."""
        found = self.strength
        for pattern, more in self.layer_strength.items():
            if name == pattern or name.startswith(pattern + "."):
                found *= more
        if found and self.steps != (0.0, 1.0):
            call = current_call()
            if call is None:
                raise RuntimeError(f"steps={self.steps}: the denoiser must be called as a whole")
            found *= call.inside(*self.steps)
        return found

    def rows(self, count: int) -> Rows:
        """Which rows of a batch of so many get no style."""
        if (told := current_rows()) is not None:
            return told
        if self.unconditional is not None:
            return Rows(self.unconditional)
        return Rows(count // 2 if getattr(self.pipe, "do_classifier_free_guidance", False) else 0)

    def off(self) -> StyleUse:
        """The same without style."""
        return dataclasses.replace(self, strength=0.0, ratio=1.0)


_uses: contextvars.ContextVar[Mapping[str, StyleUse]] = contextvars.ContextVar("eff_style_uses", default={})  # noqa: B039 - never changed in place


def current_use(uid: str) -> StyleUse | None:
    """The use of an adapter that holds in this context."""
    return _uses.get().get(uid)


def set_use(uid: str, use: StyleUse) -> contextvars.Token[Any]:
    """Let a use hold until `reset_use`."""
    return _uses.set({**_uses.get(), uid: use})


def reset_use(token: contextvars.Token[Any]) -> None:
    """Take the latest use back."""
    _uses.reset(token)


def keys_and_values(
    adapter: StyleAdapter, name: str, module: Any, use: StyleUse, q: Tensor, dtype: torch.dtype, groups: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of style [B, H, M, D] for one layer's queries [B, H, S, D], which are groups of one size.

    They are kept with the use where nothing can change them.
    """
    layer = adapter.layer(name)
    fixed = adapter.style.to_text is None
    graph = torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters())
    stored = use.kept if fixed and not graph and not torch.compiler.is_compiling() else None
    parts = (*adapter.style.parameters(), *adapter.style.buffers(), *layer.parameters())
    made_of = (dtype, use.weights, use.weights._version, *((p, p._version, p.device, p.dtype) for p in parts))
    if stored is not None and name in stored and _same(stored[name][0], made_of):
        key, value = stored[name][1]
    else:
        call = current_call()
        text = None if fixed or call is None or call.text is None else call.text[-(len(q) // groups) :]
        weights = use.weights.to(adapter.style.table.device)
        tokens = adapter.style(weights, text)
        key, value = layer.to_k_style(tokens), layer.to_v_style(tokens)
        key, value = (t.unflatten(-1, (q.shape[1], -1)).transpose(1, 2).to(dtype) for t in (key, value))
        if (norm := key_norm(module)) is not None:
            key = norm(key).to(dtype)
        if stored is not None:
            stored[name] = (made_of, (key, value))
    key, value = (_spread(t.to(q.device), len(q), name, groups) for t in (key, value))
    return key, value


def style_attention(adapter: StyleAdapter, name: str, module: Any, q: Tensor, use: StyleUse, factor: float) -> Tensor:
    """Attention of queries [B, H, S, D] to style times factor and gate, for the rows that get it; 0 for others."""
    rows = use.rows(q.shape[0])
    query = rows.prompted(q)
    if not len(query):
        return torch.zeros_like(q)
    key, value = keys_and_values(adapter, name, module, use, query, q.dtype, rows.groups)
    out = F.scaled_dot_product_attention(query, key, value)
    return rows.padded(out * amount(adapter, name, use, factor, out))


def amount(adapter: StyleAdapter, name: str, use: StyleUse, factor: float, out: Tensor) -> Tensor:
    """Strength by rows and places: factor * gate, broadcasts to the styled rows' output [b, H, S, D]."""
    found = factor * adapter.layer(name).gate.to(out.device).tanh().to(out.dtype)
    if use.keep is not None:
        found = found * _rows(use.keep, out.shape[0]).to(out.device)[:, None, None, None]
    if use.mask is not None:
        if current_layout() == "branch":
            raise ValueError(
                "a style's mask covers the whole picture, while a layout draws parts of it on their own; use eta1=0"
            )
        found = found * mask_on_tokens(use.mask.to(out.device), out.shape[2]).to(out.dtype)[:, None]
    return found


def mask_on_tokens(mask: Tensor, tokens: int) -> Tensor:
    """A mask [H, W] by mean over the points of each token, [tokens].

    Raises:
        ValueError: no grid of so many tokens has the mask's proportions.
    """
    high, wide = mask.shape
    rows = round((tokens * high / wide) ** 0.5)
    if rows < 1 or tokens % rows or abs(tokens / rows / rows - wide / high) > 0.51 / rows * max(1, wide / high):
        raise ValueError(f"a mask of {high} x {wide} does not fit a layer of {tokens} tokens; give the picture's size")
    return F.interpolate(mask[None, None].float(), (rows, tokens // rows), mode="area").flatten()


def _spread(x: Tensor, rows: int, name: str, groups: int) -> Tensor:
    """Styles of a call's prompts for all its rows: in each group the pictures of a prompt follow each other."""
    each = rows // groups
    if x.shape[0] == 1:
        return x.expand(rows, -1, -1, -1)
    if x.shape[0] == each == rows:
        return x
    if each % x.shape[0]:
        raise ValueError(f"{name}: {x.shape[0]} styles for {each} rows with style; wanted one for each, or one for all")
    return x.repeat_interleave(each // x.shape[0], 0).repeat(groups, 1, 1, 1)


def _rows(keep: Tensor, rows: int) -> Tensor:
    if keep.shape != (rows,):
        raise ValueError(f"keep is {list(keep.shape)}, wanted [{rows}], one for each row with style")
    return keep


def _same(old: tuple[Any, ...], new: tuple[Any, ...]) -> bool:
    return len(old) == len(new) and all(_equal(a, b) for a, b in zip(old, new, strict=True))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return a[0] is b[0] and a[1:] == b[1:]
    return a is b if isinstance(a, Tensor) else a == b
