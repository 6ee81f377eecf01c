"""One call of attention as the model makes it, and what comes out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eff_kernels.edit.attention import masks

if TYPE_CHECKING:
    from eff_kernels.edit.attention.tokens import TokenRoles


@dataclass(frozen=True)
class Part:
    """Which part of the attention matrix a block of logits or weights [B, h, q, Sk] is.

    Attributes:
        rows: Indices of the queries within the call, int64 [q].
        heads: Indices of the query heads, int64 [h].
        keep: Which entries are visible, bool, broadcasts to [B, h, q, Sk].
        row_numbers: ``rows`` as Python numbers.
        head_numbers: ``heads`` as Python numbers.
        count: Number of queries of the whole call.
    """

    rows: Tensor
    heads: Tensor
    keep: Tensor
    row_numbers: Sequence[int]
    head_numbers: Sequence[int]
    count: int


EditBlock = Callable[[Tensor, Part], Tensor]


@dataclass(frozen=True)
class Edit:
    """A change of logits or of weights that is carried out where the softmax is computed.

    Attributes:
        logits: ``logits(block, part)`` gets float32 logits [B, h, q, Sk] (scale, softcap and biases are in, hidden
            entries are -inf) and returns their replacement; hidden entries stay hidden.
        weights: ``weights(block, part)`` gets float32 weights after the softmax and returns their replacement.
        heads: Query heads that it is for; None for all. The others stay bit-identical.
        rows: Queries that it is for, as a slice of the call; None for all.
    """

    logits: EditBlock | None = None
    weights: EditBlock | None = None
    heads: tuple[int, ...] | None = None
    rows: slice | None = None


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention: immutable, rebuilt for each call; change it by `replace`.

    What is visible is what ``mask`` lets through, and of it only the past if ``causal``. See `keep_mask`.

    Attributes:
        module: The module that attends.
        name: Its dotted name in the model.
        layer: Its index among the layers, or None if the name tells none.
        q: Queries after rotary embedding and norms, [B, H, Sq, D].
        k: Keys with those of the cache, [B, KV, Sk, D]; query head h looks at key head h // (H / KV).
        v: Values, [B, KV, Sk, Dv].
        mask: As the host gives it: None, boolean (True is visible), additive, [B, Sk] (a padding mask of flash
            attention), or a BlockMask of flex attention.
        scale: Factor of the logits.
        causal: Whether ``mask`` leaves causality to the attention: query i then sees keys up to i + ``offset``.
        offset: Index of the key that belongs to the first query, where ``causal`` or a window counts from.
        dropout: Probability of dropping a weight.
        softcap: c of ``c * tanh(logit / c)``, or None.
        window: Width of the layer's sliding window or None. A mask of four dimensions holds it already.
        sinks: Learnt logits of the layer's sinks [H] or None: they take part in the softmax and have no value.
        bias: Position bias that is added to the logits, broadcasts to [B, H, Sq, Sk], or None.
        is_cross: Whether keys come from another sequence than the queries.
        streams: For joint attention the slice of each stream, such as ``{"image": slice(0, 64), "text": ...}``.
        roles: What the tokens are, where that was asked for and is known.
        edits: Changes of logits and weights that outer rules have asked for.
        extra: Further arguments of the host, which are passed on to it; in joint attention of diffusers
            ``image_rotary_emb``, (cosines, sines) by which queries and keys have been rotated.
        recomputed: Whether gradient checkpointing is computing this forward again.
        wants_weights: Whether the host returns its weights.
        wants_lse: Whether the log-sum-exp is welcome, where the host's kernel has it anyhow.
    """

    module: nn.Module
    name: str
    layer: int | None
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any = None
    scale: float = 1.0
    causal: bool = False
    offset: int = 0
    dropout: float = 0.0
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    is_cross: bool = False
    streams: Mapping[str, slice] | None = None
    roles: TokenRoles | None = None
    edits: tuple[Edit, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    recomputed: bool = False
    wants_weights: bool = False
    wants_lse: bool = False

    def replace(self, **changes: Any) -> AttentionCall:
        """The same call with some fields changed.

        A mask takes the place of the host's. Causality that the host left to the attention still holds unless
        ``causal=False`` is given as well.

        Raises:
            TypeError: a field does not exist.
        """
        return dataclasses.replace(self, **changes)

    def edited(
        self,
        *,
        logits: EditBlock | None = None,
        weights: EditBlock | None = None,
        heads: Sequence[int] | Tensor | None = None,
        rows: slice | None = None,
    ) -> AttentionCall:
        """The same call, whose logits or weights are changed where the softmax is computed; see `Edit`.

        Raises:
            ValueError: a head does not exist.
        """
        chosen = None if heads is None else head_indices(heads, self.num_heads)
        return self.replace(edits=(*self.edits, Edit(logits, weights, chosen, rows)))

    @property
    def num_heads(self) -> int:
        """Number of query heads."""
        return self.q.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.k.shape[1]

    @property
    def num_queries(self) -> int:
        """Number of queries of this call."""
        return self.q.shape[2]

    @property
    def num_keys(self) -> int:
        """Number of keys, those of the cache included."""
        return self.k.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """What the output is in: the type of autocast where that is on, else that of the values."""
        kind = self.q.device.type
        if self.v.dtype != torch.float64 and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self.v.dtype

    def positions(self) -> Tensor:
        """Key that each query sits on when causality or a window is counted, int64 [Sq]."""
        return torch.arange(self.num_queries, device=self.q.device) + self.offset

    def keep_mask(self, rows: Tensor | None = None) -> Tensor:
        """What is visible, bool, broadcasts to [B, H, q, Sk]; ``rows`` (int64 [q]) asks for some queries only."""
        return masks.keep(self, rows)

    def additive_mask(self, rows: Tensor | None = None) -> Tensor:
        """What is added to the logits, float32, broadcasts to [B, H, q, Sk]: mask, bias, and -inf where hidden."""
        return masks.additive(self, rows)


@dataclass(frozen=True)
class AttentionOutput:
    """What attention returns.

    Attributes:
        out: [B, H, Sq, Dv].
        weights: Weights after the softmax [B, H, Sq, Sk], if the host returns them or they were asked for.
        lse: Log-sum-exp of the logits, float32 [B, H, Sq], if it was asked for or came along.
    """

    out: Tensor
    weights: Tensor | None = None
    lse: Tensor | None = None

    def replace(self, **changes: Any) -> AttentionOutput:
        """The same output with some fields changed."""
        return dataclasses.replace(self, **changes)


def head_indices(heads: Sequence[int] | Tensor, count: int) -> tuple[int, ...]:
    """Heads given as indices or as a boolean mask [H], as sorted indices.

    Raises:
        ValueError: a head does not exist, or a boolean mask has the wrong length.
    """
    if isinstance(heads, Tensor):
        if heads.dtype == torch.bool:
            if heads.shape != (count,):
                raise ValueError(f"a mask of heads must be [{count}], got {list(heads.shape)}")
            heads = heads.nonzero()[:, 0]
        heads = heads.tolist()
    chosen = sorted({int(h) for h in heads})
    if chosen and not 0 <= chosen[0] <= chosen[-1] < count:
        raise ValueError(f"heads must be in 0..{count - 1}, got {chosen}")
    return tuple(chosen)
