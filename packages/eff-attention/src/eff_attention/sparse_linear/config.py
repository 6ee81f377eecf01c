"""Settings of sparse-linear attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eff_kernels.edit import Settings

FeatureMap = Literal["softmax", "elu", "relu"]
LinearScope = Literal["marginal", "noncritical", "all"]
Selection = Literal["block", "token"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SLAConfig(Settings):
    """All that changes what sparse-linear attention computes.

    Attributes:
        k_high: Share of critical blocks of keys for each block of queries, attended exactly; at least one block.
        k_low: Share of negligible blocks, left out; the others are marginal.
        block_q: Queries in a block. A GPU takes 16, 32, 64 or 128.
        block_k: Keys in a block.
        feature_map: phi of the linear branch: softmax over the features, elu + 1, or relu.
        linear_scope: Keys of the linear branch: those of marginal blocks (the paper), of all but critical blocks
            (branch SLA-1 of the official code), or all (branch main).
        smooth_k: Whether the mean of the keys is taken off before they are pooled.
        protect: Range (start, stop) of keys whose blocks are critical always, such as a prefix of text or registers.
        min_tokens: Calls with fewer keys run dense attention.
        selection: "block" takes blocks of keys for blocks of queries. "token" takes for each query the keys of the
            highest scores, max(1, int(k_high * keys)) of them, as Lite3R trains: slower than dense attention. It wants
            k_low=0 and linear_scope="all", and takes no settings of blocks.
        fallback: What a call with an attention mask does: "error" or "sdpa" (dense attention with the mask).
    """

    k_high: float = 0.05
    k_low: float = 0.10
    block_q: int = 64
    block_k: int = 64
    feature_map: FeatureMap = "softmax"
    linear_scope: LinearScope = "marginal"
    smooth_k: bool = True
    protect: tuple[int, int] | None = None
    min_tokens: int = 0
    selection: Selection = "block"
    fallback: Literal["error", "sdpa"] = "error"

    def check(self) -> None:
        """See `Settings`."""
        check_shares(self.k_high, self.k_low)
        for name in ("block_q", "block_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; a block holds at least one token")
        if self.selection == "token":
            self._check_token()
        if self.protect is not None and not 0 <= self.protect[0] <= self.protect[1]:
            raise ValueError(f"protect={self.protect}; wanted (start, stop) with 0 <= start <= stop")
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens={self.min_tokens} is negative")

    def _check_token(self) -> None:
        if self.k_low or self.linear_scope != "all":
            raise ValueError(
                f"selection='token' has linear attention over all keys: k_low=0 and linear_scope='all' are wanted, got "
                f"k_low={self.k_low}, linear_scope={self.linear_scope!r}"
            )
        if (self.block_q, self.block_k, self.smooth_k) != (64, 64, True):
            raise ValueError(
                f"selection='token' has no blocks; leave out block_q={self.block_q}, block_k={self.block_k} and "
                f"smooth_k={self.smooth_k}"
            )


def check_shares(k_high: float, k_low: float) -> None:
    """Refuse shares outside of [0, 1] or of more than 1 together."""
    if not (0 <= k_high <= 1 and 0 <= k_low <= 1 and k_high + k_low <= 1 + 1e-9):
        raise ValueError(f"k_high={k_high} and k_low={k_low} must lie in [0, 1] and be at most 1 together")
