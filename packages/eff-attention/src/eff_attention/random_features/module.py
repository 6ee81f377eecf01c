"""Random-feature attention as a layer: frozen scores, trained values."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from eff_attention.random_features.features import Activation, append_ones, attention_features, check_activation
from eff_attention.random_features.sampling import HeadWeights, mean_weights, sample_heads

SCORES = 1 << 24


class RandomFeatureAttention(nn.Module):
    """out_t = M^-1/2 sum_m mean_j sigma(x~_t^T W_m x~_j) V_m^T x~_j: W_m random and frozen, V_m trained.

    A drop-in [B, L, C] to [B, L, C] block (residual and norm stay outside), or attention of queries to other keys.
    A sequence costs 2 M L^2 D multiplications; memory grows with ``head_chunk`` L^2.

    Args:
        dim: C of the keys.
        num_heads: M.
        out_dim: Width of the result; None for dim.
        query_dim: C of the queries; None for dim.
        weight_mean: As in `RandomFeatureAttentionRegressor`.
        weight_std: As there; scores have variance 1 for inputs that ``scale`` brings to norm 1.
        rank: As there.
        activation: As there.
        append_one: As there.
        causal: Whether a query at t sees keys up to t only, averaged over those.
        scale: Inputs are multiplied by it: 1 for unit vectors, dim**-0.5 after a layer norm.
        query_key: Products to freeze instead of drawing them: (Q [M, r, Dq], K [M, r, Dk]), such as those of a trained
            layer; Dq and Dk count the appended one.
        head_chunk: Heads whose scores are held at a time; None for as many as have 16 million scores.
        seed: Of the random products.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        out_dim: int | None = None,
        query_dim: int | None = None,
        weight_mean: float | str | Tensor = 0.0,
        weight_std: float = 0.5,
        rank: int | None = None,
        activation: Activation = "relu",
        append_one: bool = True,
        causal: bool = False,
        scale: float = 1.0,
        query_key: tuple[Tensor, Tensor] | None = None,
        head_chunk: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_activation(activation)
        if min(dim, num_heads) < 1:
            raise ValueError(f"dim={dim}, num_heads={num_heads}; wanted at least 1 of each")
        if head_chunk is not None and head_chunk < 1:
            raise ValueError(f"head_chunk={head_chunk}; wanted at least 1, or None")
        one = int(append_one)
        query_size, key_size = (dim if query_dim is None else query_dim) + one, dim + one
        if query_key is None:
            mean = mean_weights(
                weight_mean.numpy() if isinstance(weight_mean, Tensor) else weight_mean,
                *(query_size, key_size),
                append_one=append_one,
            )
            random = np.random.RandomState(seed)
            heads = sample_heads(num_heads, query_size, key_size, random, mean=mean, std=weight_std, rank=rank)
        else:
            heads = HeadWeights(query=query_key[0].detach().clone(), key=query_key[1].detach().clone())
            shapes = [list(t.shape) for t in query_key]
            rank = shapes[0][1] if len(shapes[0]) == 3 else -1
            if shapes != [[num_heads, rank, query_size], [num_heads, rank, key_size]]:
                wanted = f"[{num_heads}, r, {query_size}] and [{num_heads}, r, {key_size}]"
                raise ValueError(f"query_key has shapes {shapes}, wanted {wanted}")
        dtype = torch.get_default_dtype()
        for name, value in heads._asdict().items():
            self.register_buffer(f"weight_{name}", None if value is None else value.to(dtype))
        self.v = nn.Parameter(torch.empty(num_heads, key_size, dim if out_dim is None else out_dim))
        self.activation, self.append_one, self.causal, self.scale = activation, append_one, causal, scale
        self.head_chunk = head_chunk
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the values so that results have about the size of the inputs."""
        nn.init.normal_(self.v, std=self.v.shape[1] ** -0.5)

    @property
    def heads(self) -> HeadWeights:
        """The frozen products."""
        return HeadWeights(*(getattr(self, f"weight_{name}") for name in HeadWeights._fields))

    def forward(self, x: Tensor, query: Tensor | None = None, *, key_padding_mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: Keys [B, N, C].
            query: [B, L, C'], or None for the keys themselves.
            key_padding_mask: Boolean [B, N], True for padding, as in `nn.MultiheadAttention`; padding may hold NaN.

        Returns:
            [B, L, out_dim]. A query without any key gets 0.
        """
        query, keys, keep = self._inputs(x, query, key_padding_mask)
        num_heads = len(self.v)
        step = self.head_chunk or max(1, SCORES // max(1, len(x) * query.shape[1] * keys.shape[1]))
        out = query.new_zeros(*query.shape[:2], self.v.shape[2])
        for start in range(0, num_heads, step):
            heads = self.heads.heads(slice(start, start + step))
            phi = attention_features(query, keys, heads, activation=self.activation, keep=keep)
            values = self.v[start : start + step]
            out = out + (phi.flatten(2) @ values.flatten(0, 1)) * (len(values) / num_heads) ** 0.5
        return out

    def features(self, x: Tensor, query: Tensor | None = None, *, key_padding_mask: Tensor | None = None) -> Tensor:
        """phi, [B, L, M * D]; the result of `forward` is ``phi @ v.flatten(0, 1)``."""
        query, keys, keep = self._inputs(x, query, key_padding_mask)
        return attention_features(query, keys, self.heads, activation=self.activation, keep=keep).flatten(2)

    def _inputs(
        self, x: Tensor, query: Tensor | None, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if x.dim() != 3 or (query is not None and (query.dim() != 3 or len(query) != len(x))):
            shapes = list(x.shape), None if query is None else list(query.shape)
            raise ValueError(f"wanted keys [B, N, C] and queries [B, L, C'], got {shapes[0]} and {shapes[1]}")
        one, keep = int(self.append_one), None
        wanted = self.heads.query_dim - one, self.heads.key_dim - one
        got = (x if query is None else query).shape[2], x.shape[2]
        if got != wanted:
            raise ValueError(f"queries and keys have {got} channels, the layer takes {wanted}")
        if key_padding_mask is not None:
            if key_padding_mask.shape != x.shape[:2] or key_padding_mask.dtype != torch.bool:
                raise ValueError(
                    f"key_padding_mask is {key_padding_mask.dtype} {list(key_padding_mask.shape)}, "
                    f"wanted torch.bool {list(x.shape[:2])}"
                )
            x = x.masked_fill(key_padding_mask[..., None], 0.0)
            keep = ~key_padding_mask[:, None]
        keys = self.scale * x
        query = keys if query is None else self.scale * query
        if self.causal:
            if query.shape[1] > keys.shape[1]:
                raise ValueError(f"causal: {query.shape[1]} queries for {keys.shape[1]} keys; wanted at most as many")
            lengths = query.shape[1], keys.shape[1]
            # Fewer queries than keys are the last ones, as in decoding with a cache.
            seen = torch.ones(lengths, dtype=torch.bool, device=x.device).tril(lengths[1] - lengths[0])
            keep = seen if keep is None else keep & seen
        return (append_ones(query), append_ones(keys), keep) if self.append_one else (query, keys, keep)

    @torch.no_grad()
    def fit_closed_form(self, batches: Iterable[tuple[Tensor, ...]], *, alpha: float) -> float:
        """Set V to the ridge solution over all tokens of the batches, in float64.

        Minimises (1/n) |phi V - y|^2 + alpha |V|^2 over n tokens. Holds one matrix [M D, M D]; the data are read once.

        Args:
            batches: (x, y) for self queries, or (x, query, y), or (x, query, y, key_padding_mask), query None for x;
                y [B, L, out_dim]. With self queries padded tokens are left out of the equations too.
            alpha: Penalty, above 0.

        Returns:
            Mean squared error of the fit over tokens and outputs.

        Raises:
            ValueError: no tokens, a shape that does not fit, values that are not finite, or alpha <= 0.
        """
        if not alpha > 0:
            raise ValueError(f"alpha={alpha}; wanted a number above 0")
        size, out_dim = self.v.shape[0] * self.v.shape[1], self.v.shape[2]
        moment, target, squares, count = self.v.new_zeros(size, size, dtype=torch.float64), None, 0.0, 0
        frozen = HeadWeights(*(None if t is None else t.double() for t in self.heads))
        for batch in batches:
            x, query, y, mask = _unpack(batch)
            q, keys, keep = self._inputs(x.double(), None if query is None else query.double(), mask)
            phi = attention_features(q, keys, frozen, activation=self.activation, keep=keep).flatten(2)
            if y.shape != (*phi.shape[:2], out_dim):
                raise ValueError(f"targets have shape {list(y.shape)}, wanted {[*phi.shape[:2], out_dim]}")
            used = torch.ones(phi.shape[:2], dtype=torch.bool, device=phi.device)
            if mask is not None and query is None:
                used = ~mask
            rows, y = phi[used], y[used].double()
            if not (rows.isfinite().all() and y.isfinite().all()):
                raise ValueError("inputs or targets of a batch are not finite")
            moment.addmm_(rows.T, rows)
            target = rows.T @ y if target is None else target + rows.T @ y
            squares, count = squares + float(y.square().sum()), count + len(rows)
        if target is None or count == 0:
            raise ValueError("fit_closed_form got no tokens")
        ridge = moment.clone()
        ridge.diagonal().add_(count * alpha)
        v = torch.cholesky_solve(target, torch.linalg.cholesky(ridge))
        self.v.copy_(v.view_as(self.v))
        rss = squares - 2 * float((v * target).sum()) + float((v * (moment @ v)).sum())
        return max(rss, 0.0) / (count * out_dim)

    def extra_repr(self) -> str:
        """Sizes that decide the cost."""
        heads, size, out = self.v.shape
        return f"num_heads={heads}, key_dim={size}, out_dim={out}, causal={self.causal}, activation={self.activation!r}"


def _unpack(batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    if len(batch) == 2:
        return batch[0], None, batch[1], None
    if len(batch) in (3, 4):
        return batch[0], batch[1], batch[2], batch[3] if len(batch) == 4 else None
    raise ValueError(f"a batch is (x, y), (x, query, y) or (x, query, y, key_padding_mask), got {len(batch)} entries")
