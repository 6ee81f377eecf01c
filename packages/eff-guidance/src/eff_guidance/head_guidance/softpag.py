"""SoftPAG: attention maps of chosen heads moved towards a target (arXiv 2506.10978, section 4.3 and appendix C)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from eff_kernels.edit.attention import Attend, AttentionCall, AttentionOutput, dense, head_indices
from torch import Tensor, nn

from eff_guidance.head_guidance.config import Path, Target, check_strength
from eff_guidance.head_guidance.paths import PATHS, edit_of
from eff_guidance.head_guidance.targets import TARGETS, Chosen

_NOWHERE = nn.Identity()


def soft_perturb_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    strength: float | Sequence[float] | Tensor,
    heads: Sequence[int] | Tensor | None = None,
    target: Target = "identity",
    path: Path = "linear",
    image: slice | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention whose map A is ``(1 - u) A + u P`` in the chosen heads, without building A.

    Targets P, with rows that are not named left as they are:

    - "identity": each token, text included, keeps its own value. All numbers of the paper are of this one.
    - "uniform": the mean of all values. "query_mean": all rows attend by the mean query; "query_mean_image" and
      "query_mean_text": the rows of one stream by its own mean.
    - "max": the value of the key with the largest weight.
    - "image_identity": image rows see of the image only themselves (logits -inf), and the text.
      "image_renorm": image rows move their weight on the image to themselves and keep that on the text.
    - "ii_zero", "it_zero", "ti_zero", "tt_zero": weights of one block are 0 (rows first: "it" is what image rows give
      to text keys); rows then sum to less than 1. "ii_mask" and so on: logits are -inf instead.

    Args:
        q: Queries [B, H, N, D] of the whole sequence, normalised and rotated.
        k: Keys [B, H or fewer, N, D].
        v: Values [B, H or fewer, N, D].
        strength: u from 0 to 1, or one for each chosen head in order of their numbers. A tensor stays on the graph
            and is not checked for its range.
        heads: Indices or boolean mask [H] of the heads to damage; None for all.
        target: P.
        path: "slerp" and "log_linear" (target "identity") compute the map of the chosen heads in blocks of rows.
        image: Where the image is in the sequence, at its begin or end; the rest is text.
        mask: As scaled_dot_product_attention takes it.
        scale: Of the logits; D ** -0.5 by default.

    Returns:
        [B, H, N, D]; heads that are not chosen are bit-identical to scaled_dot_product_attention.

    Raises:
        ValueError: keys and queries of different length, a strength outside of 0..1, an unknown target or head, a
            target that needs ``image``, a path that the target does not have.
    """
    count, length = q.shape[1], q.shape[2]
    if v.shape[2] != k.shape[2] or count % k.shape[1]:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} do not fit each other")
    chosen = tuple(range(count)) if heads is None else head_indices(heads, count)
    if not isinstance(strength, Tensor):
        many = tuple(float(u) for u in strength) if isinstance(strength, Sequence) else float(strength)
        strength = torch.tensor(check_strength(many, len(chosen)), dtype=torch.float64)
    strength = strength.reshape(-1).expand(len(chosen))
    while mask is not None and mask.dim() < 4:
        mask = mask[None]
    call = AttentionCall(
        _NOWHERE, "soft_perturb_attention", None, q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale,
        streams=_streams(image, length),
    )  # fmt: skip
    return perturb(call, Attend((), 0, dense), chosen, strength, target, path).out


def perturb(
    call: AttentionCall,
    attend: Attend,
    heads: tuple[int, ...],
    strength: Tensor,
    target: str,
    path: str,
    first: int = 0,
) -> AttentionOutput:
    """`soft_perturb_attention` on a call of a model.

    Args:
        call: The call.
        attend: Answers it.
        heads: Heads to damage, in order.
        strength: u of each of them [h].
        target: P.
        path: How it is moved there.
        first: Samples of the batch before this one stay as they are.

    Raises:
        ValueError: as `soft_perturb_attention`.
    """
    _check(call, target, path)
    if not heads:
        return attend(call)
    if path != "linear":
        return attend.with_weights(call, edit_of(path, strength, first), heads=heads)
    base = attend(call)
    every = len(heads) == call.num_heads
    rows, damaged = TARGETS[target](_chosen(call, None if every else heads, first))
    own = base.out[first:, :, rows]
    mixed = blend(own if every else own[:, list(heads)], damaged, strength[:, None, None])
    if every and not first and rows == _ALL:
        return base.replace(out=mixed, weights=None)
    out = base.out.clone()
    out[first:, _ALL if every else list(heads), rows] = mixed
    return base.replace(out=out, weights=None)


def blend(kept: Tensor, damaged: Tensor, strength: Tensor) -> Tensor:
    """``(1 - u) kept + u damaged``, exactly the one or the other at the ends, in float32 at least."""
    precise = torch.promote_types(kept.dtype, torch.float32)
    u = strength.to(device=kept.device, dtype=precise)
    return ((1 - u) * kept + u * damaged).to(kept.dtype)


_ALL = slice(None)


def _chosen(call: AttentionCall, heads: tuple[int, ...] | None, first: int) -> Chosen:
    q, k, v = (t[first:].to(call.dtype) for t in (call.q, call.k, call.v))
    group = call.num_heads // call.num_kv_heads
    if heads is not None:
        q, k, v = q[:, list(heads)], k[:, [h // group for h in heads]], v[:, [h // group for h in heads]]
    elif group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = None
    if call.mask is not None:
        mask = call.additive_mask()
        mask = mask[first:] if mask.shape[0] > 1 else mask
        mask = mask[:, list(heads)] if heads is not None and mask.shape[1] > 1 else mask
        mask = mask.to(torch.promote_types(call.dtype, torch.float32))
    streams = call.streams or {}
    return Chosen(q, k, v, call.scale, mask, streams.get("image"), streams.get("text"))


def _check(call: AttentionCall, target: str, path: str) -> None:
    if target not in TARGETS:
        raise ValueError(f"target={target!r}; use one of {', '.join(TARGETS)}")
    if path != "linear" and (path not in PATHS or target != "identity"):
        raise ValueError(
            f"path={path!r} with target={target!r}; use 'linear', or 'slerp', 'log_linear' with 'identity'"
        )
    if call.is_cross or call.num_queries != call.num_keys:
        raise ValueError(
            f"{call.name}: {call.num_queries} queries and {call.num_keys} keys; only the map of self-attention or "
            "joint attention, where each query is a key, can be moved to a target"
        )
    if call.causal or call.edits or any(x is not None for x in (call.softcap, call.sinks, call.window, call.bias)):
        raise ValueError(
            f"{call.name}: causality, windows, softcap, sinks, bias or edits of outer rules are not handled"
        )


def _streams(image: slice | None, length: int) -> dict[str, slice] | None:
    if image is None:
        return None
    start, stop, step = image.indices(length)
    if step != 1 or start >= stop or (start > 0 and stop < length) or (start == 0 and stop == length):
        raise ValueError(f"image={image} of {length} tokens; the image must come first or last, the text beside it")
    text = slice(stop, length) if start == 0 else slice(0, start)
    return {"image": slice(start, stop), "text": text}
