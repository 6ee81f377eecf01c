"""Samples as people hold them, made into queries, keys and a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from sklearn.utils import check_array

QueryFrom = Literal["first", "mean", "self", "constant"]


class Sets(NamedTuple):
    """Samples: queries [n, Lq, d], keys [n, N, d'], keep [n, N] (None: every key counts)."""

    query: np.ndarray
    keys: np.ndarray
    keep: np.ndarray | None


def as_sets(X: Any, query: QueryFrom, token_dim: int | None) -> Sets:
    """Read samples of any of the forms that the estimators document.

    Raises:
        ValueError: the form, a shape or a value is not one of them; the message says which.
    """
    if query not in ("first", "mean", "self", "constant"):
        raise ValueError(f"query={query!r}; use 'first', 'mean', 'self' or 'constant'")
    if isinstance(X, tuple):
        return _pair(X)
    keep = None
    if isinstance(X, list) and num_dimensions(X) == 0:
        X = [np.asarray(x) for x in X]  # sets of different sizes, each a list of tokens
    if isinstance(X, list) and X and all(getattr(x, "ndim", 0) == 2 for x in X):
        X, keep = _padded(X)
    if num_dimensions(X) == 2:
        if token_dim is None:
            raise ValueError(
                "Expected samples [n, tokens, d], got 2 dimensions. Reshape your data, or set token_dim "
                "to read each row as tokens of that length one after the other"
            )
        flat = check_array(X, dtype=np.float64)
        if flat.shape[1] % token_dim:
            raise ValueError(f"{flat.shape[1]} feature(s) are not a multiple of token_dim={token_dim}")
        X = flat.reshape(len(flat), -1, token_dim)
    tokens = check_array(X, dtype=np.float64, allow_nd=True)
    if tokens.ndim != 3:
        raise ValueError(f"expected samples [n, tokens, d], got shape {tokens.shape}")
    if query == "first":
        if tokens.shape[1] < 2:
            raise ValueError(
                f"the first token is the query: at least one more is needed as a key, got {tokens.shape[1]} token(s)"
            )
        return _checked(tokens[:, :1], tokens[:, 1:], None if keep is None else keep[:, 1:])
    if query == "self":
        return _checked(tokens, tokens, keep)
    weights = np.ones(tokens.shape[:2]) if keep is None else keep.astype(np.float64)
    mean = np.einsum("ni,nid->nd", weights, tokens) / np.maximum(weights.sum(1), 1)[:, None]
    return _checked((mean if query == "mean" else np.zeros_like(mean))[:, None], tokens, keep)


def num_dimensions(x: Any) -> int:
    """Dimensions of an array, a frame, a list of lists or whatever else converts to an array; 0 for ragged sets.

    Raises:
        ValueError: lists that are neither an array nor sets of tokens of one length.
    """
    if hasattr(x, "ndim"):
        return int(x.ndim)
    try:
        return np.asarray(x).ndim
    except ValueError:
        pass
    try:
        shapes = [np.asarray(part).shape for part in x]
    except ValueError as error:
        raise ValueError("the tokens of a sample have different lengths; wanted sets [N_i, d] of one d") from error
    if any(len(shape) != 2 for shape in shapes):
        raise ValueError(f"samples have shapes {shapes[:3]} ...; wanted arrays [n, tokens, d] or sets [N_i, d] each")
    return 0


def _padded(samples: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sets of different sizes, [N_i, d] each, as one array and a mask."""
    dims = {x.shape[1] for x in samples}
    if len(dims) > 1:
        raise ValueError(f"the sets hold tokens of different dimensions: {sorted(dims)}")
    lengths = np.array([len(x) for x in samples])
    keep = np.arange(lengths.max(initial=0)) < lengths[:, None]
    out = np.zeros((*keep.shape, dims.pop()))
    out[keep] = np.concatenate(samples)
    return out, keep


def _pair(X: tuple[Any, ...]) -> Sets:
    if len(X) not in (2, 3):
        raise ValueError(f"a tuple is (query [n, d], keys [n, N, d']) or that with a mask [n, N], got {len(X)} entries")
    keys = np.asarray(X[1], dtype=np.float64)
    query = check_array(X[0], dtype=np.float64)
    if keys.ndim != 3 or len(keys) != len(query):
        raise ValueError(f"keys have shape {keys.shape}, wanted ({len(query)}, N, d')")
    keep = None
    if len(X) == 3 and X[2] is not None:
        keep = np.asarray(X[2])
        if keep.shape != keys.shape[:2] or keep.dtype != bool:
            raise ValueError(
                f"mask is {keep.dtype} {keep.shape}, wanted bool {keys.shape[:2]}, True for keys that count"
            )
        keys = np.where(keep[..., None], keys, 0.0)
    return _checked(query[:, None], check_array(keys, dtype=np.float64, allow_nd=True, ensure_min_features=0), keep)


def _checked(query: np.ndarray, keys: np.ndarray, keep: np.ndarray | None) -> Sets:
    empty = np.flatnonzero(~keep.any(1)) if keep is not None else np.arange(len(keys) if keys.shape[1] == 0 else 0)
    if len(empty):
        raise ValueError(f"every sample needs at least one key; {len(empty)} have none, the first is sample {empty[0]}")
    return Sets(query, keys, keep)
