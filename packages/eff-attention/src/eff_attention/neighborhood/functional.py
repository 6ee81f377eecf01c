"""natten's functions: the same names, order of arguments and defaults, so that an import is all there is to change."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import eff_kernels
import torch
import torch.nn.functional as F
from eff_kernels.ops.neighborhood_attention import window_bounds
from torch import Tensor

from eff_attention.neighborhood.unfused import na_av, na_qk


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    backend: str | None = None,
    return_lse: bool = False,
    dropout_p: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from each token of a 1-D, 2-D or 3-D map to the window of tokens around it.

    Args:
        query: [B, *S, H, D].
        key: [B, *S, Hkv, D]; H must be a multiple of Hkv.
        value: [B, *S, Hkv, Dv].
        kernel_size: Keys in the window; one number, or one an axis.
        stride: Neighbouring queries that share a window.
        dilation: Distance between the keys of a window.
        is_causal: Whether keys after the query are out of sight.
        scale: Factor of the scores; D ** -0.5 by default.
        additional_keys: [B, M, Hkv, D], which every query sees.
        additional_values: [B, M, Hkv, Dv].
        backend: None or "auto" to choose, or "cpu", "triton", "reference".
        return_lse: Return the logarithm of the sum of the exponentials as well, float32 [B, *S, H].
        dropout_p: Share of the weights that are dropped, for training. It goes through `na_qk` and `na_av`, which hold
            the weights of all windows.

    Returns:
        [B, *S, H, Dv], with ``return_lse`` a pair.

    Raises:
        ValueError: shapes or windows do not fit; the message names the axis, the value and the limit.
    """
    if query.dim() and not query.size(-1):
        raise ValueError(f"query must have a head_dim of at least 1, got {list(query.shape)}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p}; wanted a share of at least 0 and below 1")
    windows = kernel_size, stride, dilation, is_causal or False
    if dropout_p:
        if backend not in (None, "auto"):
            raise ValueError(f"backend={backend!r} has no dropout; leave backend or dropout_p out")
        more = additional_keys, additional_values
        out, lse = _with_dropout(query, key, value, windows, scale, *more, dropout_p)
        return (out, lse) if return_lse else out
    result = eff_kernels.neighborhood_attention(
        query, key, value, *windows, scale, additional_keys, additional_values, backend=backend or "auto"
    )
    return (result.output, result.lse) if return_lse else result.output


def _with_dropout(
    query: Tensor, key: Tensor, value: Tensor, windows: tuple[Any, Any, Any, Any], scale: float | None,
    more_keys: Tensor | None, more_values: Tensor | None, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weights in memory, some of them dropped and the others scaled up; lse is of all."""
    scale = query.size(-1) ** -0.5 if scale is None else scale
    scores = na_qk(query * scale, key, *windows, additional_keys=more_keys).float()
    weights = F.dropout(scores.softmax(-1), dropout_p).to(value.dtype)
    return na_av(weights, value, *windows, additional_values=more_values), scores.logsumexp(-1)


def _of_rank(rank: int, query: Tensor, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    if query.dim() != rank + 3:
        shape = ", ".join(["batch", *("xyz"[:rank]), "heads", "head_dim"])
        raise ValueError(f"na{rank}d takes a query of {rank + 3} dimensions [{shape}], got {list(query.shape)}")
    return neighborhood_attention(query, *args, **options)


def na1d(query: Tensor, *args: Any, **options: Any) -> Any:
    """`neighborhood_attention` over sequences, query [B, L, H, D]; the arguments are those of natten's ``na1d``."""
    return _of_rank(1, query, args, options)


def na2d(query: Tensor, *args: Any, **options: Any) -> Any:
    """`neighborhood_attention` over pictures, query [B, X, Y, H, D]; the arguments are those of natten's ``na2d``."""
    return _of_rank(2, query, args, options)


def na3d(query: Tensor, *args: Any, **options: Any) -> Any:
    """`neighborhood_attention` over videos, query [B, X, Y, Z, H, D]; the arguments are those of natten's ``na3d``."""
    return _of_rank(3, query, args, options)


def na_flops(shape: Sequence[int], kernel_size: Sequence[int], *, heads: int, head_dim: int, batch: int = 1) -> int:
    """Arithmetic of the two products of one forward: 4 * B * N * prod(K) * H * D."""
    return 4 * batch * math.prod(shape) * math.prod(kernel_size) * heads * head_dim


def na_mask_mod(
    shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    device: str | torch.device = "cpu",
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The windows as a ``mask_mod`` of FlexAttention, over the tokens of a map in row-major order.

    Args:
        shape: Lengths of the axes.
        kernel_size: Keys in the window, on each axis.
        stride: Neighbouring queries that share a window, on each axis.
        dilation: Distance between keys, on each axis.
        is_causal: Whether keys after the query are out of sight, on each axis.
        device: Where the mask will be used.
    """
    settings = list(zip(shape, kernel_size, stride, dilation, is_causal, strict=True))
    bounds = [[b.to(device) for b in window_bounds(*axis)] for axis in settings]

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = torch.ones_like(query + key, dtype=torch.bool)
        for (length, _, _, spacing, _), (first, last) in zip(reversed(settings), reversed(bounds), strict=True):
            i, j = query % length, key % length
            seen = seen & (j >= first[i]) & (j <= last[i]) & (i % spacing == j % spacing)
            query, key = query // length, key // length
        return seen

    return mask_mod
