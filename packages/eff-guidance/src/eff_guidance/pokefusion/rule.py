"""How style gets into attention: a rule where PyTorch's kernel runs, a forward around attention of other kinds."""

from __future__ import annotations

from typing import Any

import torch
from eff_kernels.edit.attention import Attend, AttentionCall
from eff_kernels.edit.attention.forward import Forward
from torch import Tensor

from eff_guidance.denoiser import Watched, check_whole
from eff_guidance.pokefusion.adapter import StyleAdapter
from eff_guidance.pokefusion.use import (
    StyleUse,
    amount,
    current_use,
    keys_and_values,
    reset_use,
    set_use,
    style_attention,
)
from eff_guidance.together import current_layout

# Processors that call scaled_dot_product_attention once, on all that the layer attends to.
_ONE_CALL = (
    "AttnProcessor2_0", "FusedAttnProcessor2_0", "JointAttnProcessor2_0", "FusedJointAttnProcessor2_0",
    "FluxAttnProcessor", "SanaAttnProcessor2_0",
)  # fmt: skip


def calls_once(module: Any) -> bool:
    """Whether a rule sees the module's attention as one call."""
    return type(module.processor).__name__ in _ONE_CALL


def acting(adapter: StyleAdapter, name: str) -> tuple[StyleUse, float] | None:
    """The use that holds now and the layer's strength, or None if style does not act here."""
    use = current_use(adapter.uid)
    factor = 0.0 if use is None else use.factor(name)
    return None if use is None or not factor else (use, factor)


class StyleRule:
    """Adds what the layer's queries read from style to what they read from text.

    Attributes:
        adapter: The trained parts.
        name: Of the layer in the adapter.
    """

    def __init__(self, adapter: StyleAdapter, name: str) -> None:
        self.adapter, self.name = adapter, name

    def __call__(self, call: AttentionCall, attend: Attend) -> Any:
        """Answer one call of attention."""
        answer = attend(call)
        now = acting(self.adapter, self.name)
        if now is None:
            return answer
        check_whole(call.module)
        if call.streams is None and getattr(call.module, "added_kv_proj_dim", None) is not None:
            raise ValueError(f"{call.name} ({type(call.module).__name__}): the order of its tokens is not known")
        image = slice(None) if call.streams is None else call.streams["image"]
        if self.adapter.config.fusion == "joint":
            if current_layout() != "none":
                raise ValueError("a style with fusion='joint' brings keys of its own, which a layout cannot place")
            more = self._joint(call, attend, answer.out, image, *now)
        else:
            query = _without_rotation(call)[:, :, image].to(call.dtype)
            more = style_attention(self.adapter, self.name, call.module, query, *now)
        out = answer.out.clone()
        out[:, :, image] += more.to(out.dtype)
        return answer.replace(out=out)

    def _joint(
        self, call: AttentionCall, attend: Attend, plain: Tensor, image: slice, use: StyleUse, factor: float
    ) -> Tensor:
        """What the joint softmax changes: factor * gate * (attention to text and style together - to text alone)."""
        rows = use.rows(call.q.shape[0])
        q = rows.prompted(call.q)
        if not len(q):
            return torch.zeros_like(plain[:, :, image])
        key, value = keys_and_values(self.adapter, self.name, call.module, use, q, call.dtype, rows.groups)
        k, v = (torch.cat([rows.prompted(a).to(b.dtype), b], 2) for a, b in ((call.k, key), (call.v, value)))
        mask = call.mask
        if mask is not None:
            open_ = mask.new_ones(()) if mask.dtype == torch.bool else mask.new_zeros(())
            mask = rows.prompted(mask) if mask.shape[0] == call.q.shape[0] else mask
            mask = torch.cat([mask, open_.expand(*mask.shape[:-1], key.shape[2])], -1)
        both = attend(call.replace(q=q, k=k, v=v, mask=mask)).out[:, :, image]
        more = (both - rows.prompted(plain[:, :, image])) * amount(self.adapter, self.name, use, factor, both)
        return rows.padded(more)


class StyledAttention(Forward):
    """Forward of a layer of UNets whose processor is none that a rule can see (eager, sliced, with picture adapters).

    What comes out behind the frozen output projection is linear in what goes into it, so that style goes through the
    projection by itself.
    """

    adapter: StyleAdapter
    name: str

    def __init__(self, module: Any, adapter: StyleAdapter, name: str) -> None:
        super().__init__(module)
        self.adapter, self.name = adapter, name

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the attention."""
        attn: Any = self.module
        if calls_once(attn):
            return self.plain(hidden_states, *args, **kwargs)
        out = self.by_class(attn, hidden_states, *args, **kwargs)
        now = acting(self.adapter, self.name)
        if now is None:
            return out
        if self.adapter.config.fusion == "joint" or hidden_states.dim() != 3 or attn.spatial_norm is not None:
            kind = type(attn.processor).__name__
            raise ValueError(
                f"{self.name}: with {kind} style can be decoupled only, in layers of tokens; use "
                "unet.set_attn_processor(AttnProcessor2_0())"
            )
        inner = hidden_states
        if attn.group_norm is not None:
            inner = attn.group_norm(inner.transpose(1, 2)).transpose(1, 2)
        query = attn.to_q(inner).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        style = style_attention(self.adapter, self.name, attn, query, *now).transpose(1, 2).flatten(2)
        project = attn.to_out[0]
        return out + (project(style) - project(torch.zeros_like(style[:1, :1]))) / attn.rescale_output_factor

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "adapter": self.adapter, "name": self.name}


class StyledDenoiser(Watched):
    """Forward of a model with style: knows the step and the text, and makes the second pass of two-scale guidance."""

    adapter: StyleAdapter

    def __init__(self, module: Any, adapter: StyleAdapter) -> None:
        super().__init__(module, None)
        self.adapter = adapter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        use = current_use(self.adapter.uid)
        if use is None or not use.strength:
            return self.plain(*args, **kwargs)
        if use.steps == (0.0, 1.0) and use.ratio == 1.0 and self.adapter.style.to_text is None:
            return self.plain(*args, **kwargs)
        watched = Watched(self.module, getattr(use.pipe, "scheduler", None))
        watched.own = self.own
        if use.ratio == 1.0:
            return watched(*args, **kwargs)
        if current_layout() != "none":
            raise ValueError(
                f"a style with ratio={use.ratio} evaluates the denoiser twice, which a layout cannot follow"
            )
        full = watched(*args, **kwargs)
        token = set_use(self.adapter.uid, use.off())
        try:
            text = self.plain(*args, **kwargs)
        finally:
            reset_use(token)
        return _between(text, full, use.ratio)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "adapter": self.adapter}


def _between(text: Any, full: Any, ratio: float) -> Any:
    """The first entry of what a denoiser returns: text + ratio * (full - text)."""
    if isinstance(text, tuple):
        return (text[0] + ratio * (full[0] - text[0]), *text[1:])
    return type(text)(sample=text.sample + ratio * (full.sample - text.sample))


def _without_rotation(call: AttentionCall) -> Tensor:
    """Queries before their rotary embedding: style has no place on the picture to be rotated to."""
    rotary = call.extra.get("image_rotary_emb")
    if rotary is None:
        return call.q
    from diffusers.models.embeddings import apply_rotary_emb

    cos, sin = rotary
    back: Tensor = apply_rotary_emb(call.q, (cos, -sin), sequence_dim=2)
    return back
