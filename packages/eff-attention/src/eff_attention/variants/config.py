"""Settings of a layer's token mixer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from eff_kernels.edit import Settings

Kind = Literal["standard", "mlp", "approximate", "non_approximate", "rnd_emb_qk", "fixed_seq_qk", "static_emb_qk"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionVariantConfig(Settings):
    """All that changes what a token mixer computes.

    Attributes:
        kind: Which mixer. "standard" is the attention of the host.
        rope: Whether queries and keys are rotated by position. In "non_approximate" a rotation has no effect: query and
            key of a score come from the same position.
        qk_norm: RMSNorm on queries and keys, where the host has none.
        random_std: Standard deviation of the random sequence of "rnd_emb_qk".
        random_seed: Its seed.
        fixed_ids: The token ids of "fixed_seq_qk", at least ``max_len``.
        max_len: Longest input of "rnd_emb_qk" and "fixed_seq_qk".
        detach_embeddings: Whether "static_emb_qk" keeps the gradient of its maps out of the embedding.
        chunk_size: Of "approximate", as in `eff_kernels.taylor_linear_attention`.
    """

    kind: Kind
    rope: bool = True
    qk_norm: bool = False
    random_std: float = 0.02
    random_seed: int = 0
    fixed_ids: tuple[int, ...] | None = None
    max_len: int = 2048
    detach_embeddings: bool = False
    chunk_size: int | None = None

    def check(self) -> None:
        """See `Settings`."""
        if self.max_len < 1:
            raise ValueError(f"max_len={self.max_len}; wanted at least 1")
        if self.random_std <= 0:
            raise ValueError(f"random_std={self.random_std}; wanted a positive number")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size={self.chunk_size}; wanted at least 1, or None")
        if (self.kind == "fixed_seq_qk") != (self.fixed_ids is not None):
            raise ValueError(f"fixed_ids belong to kind='fixed_seq_qk' and to no other, got kind={self.kind!r}")
        if self.fixed_ids is not None and len(self.fixed_ids) < self.max_len:
            raise ValueError(f"fixed_ids has {len(self.fixed_ids)} ids; wanted at least max_len={self.max_len}")

    @property
    def stream(self) -> tuple[Any, ...] | None:
        """What the sequence behind a static map depends on, or None for mixers without one."""
        if self.kind == "rnd_emb_qk":
            return self.kind, self.random_std, self.random_seed, self.max_len
        return (self.kind, self.fixed_ids, self.max_len) if self.kind == "fixed_seq_qk" else None
