"""Statistics of attention that QuantVLA matches: spread of the logits by head, energy behind the output projection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from eff_kernels.edit import matches
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eff_quant.quantvla.attention import AttentionParts, attention_parts
from eff_quant.quantvla.moments import MASKED, LogitMoments, Spread, add_products
from eff_quant.quantvla.runs import Run, padding, removed, run_batches


@dataclass(frozen=True, slots=True)
class ModuleStats:
    """Of one attention module.

    Attributes:
        std: Standard deviation of the logits before softmax for each query head, averaged over samples and calls.
        rms: Root mean square of the output projection's result, averaged over calls.
        calls: How many calls were seen.
    """

    std: tuple[float, ...]
    rms: float
    calls: int


@dataclass(frozen=True, slots=True)
class AttentionStats:
    """Statistics by module name, and how the spread was taken."""

    modules: Mapping[str, ModuleStats]
    spread: Spread


def collect_attention_stats(
    model: nn.Module,
    batches: Iterable[Any],
    targets: Sequence[str],
    *,
    std: Spread = "global",
    run: Run | None = None,
    seed: int = 0,
) -> AttentionStats:
    """Run a model and measure its attention: the logits that softmax gets, and what the output projection returns.

    The logits are taken where they are used: from the arguments of ``scaled_dot_product_attention``, so after norms,
    rotary embedding and the cache, and recomputed in float32 in blocks; or from the argument of ``softmax`` in
    implementations that compute them (where an additive bias that is no mask counts as a part of them). Masked pairs
    and padding do not count. diffusers, transformers (``attn_implementation`` "sdpa" or "eager") and plain modules with
    separate projections work; a model compiled by torch.compile does not.

    Args:
        model: Any module; it is run in evaluation mode and left as it was.
        batches: Each one a mapping of keyword arguments, a tuple of arguments, or a single argument. An
            ``attention_mask`` [B, T] of a mapping marks padding.
        targets: Patterns of attention modules, see `eff_kernels.matches`; ``layout.attention`` of a `QuantLayout`.
        std: ``"global"`` over all pairs of a head, or ``"row"``: within the rows of queries.
        run: Runs the model on one batch, such as all its denoising steps, in place of calling it.
        seed: Of the random numbers that a batch sees; the same for teacher and student.

    Raises:
        ValueError: no batches, a target that fits nothing, a module without known projections, or one whose logits were
            never seen.
    """
    if std not in ("global", "row"):
        raise ValueError(f"std={std!r}; use 'global' or 'row'")
    modules = find_attention(model, targets)
    watch = _Watch(std)
    hooks = []
    for name, module in modules.items():
        parts = attention_parts(name, module)
        seen = watch.seen.setdefault(name, _Seen())
        hooks += [
            module.register_forward_pre_hook(lambda m, args, name=name, parts=parts: watch.enter(name, parts)),
            module.register_forward_hook(lambda m, args, out: watch.leave(), always_call=True),
            parts.out.register_forward_hook(watch.output(seen)),
        ]
    with removed(hooks):
        for batch, go in run_batches(model, batches, run, seed):
            watch.padding = padding(batch)
            with watch:
                go()
    return AttentionStats({name: seen.result(name) for name, seen in watch.seen.items()}, std)


def find_attention(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """The attention modules that the patterns take in, by name.

    Raises:
        ValueError: no patterns, or one that fits no module.
    """
    if isinstance(targets, str):
        targets = (targets,)
    names = [name for name, _ in model.named_modules() if name]
    idle = [t for t in targets if not any(matches(n, t) for n in names)]
    if idle or not targets:
        raise ValueError(f"no attention module fits {', '.join(map(repr, idle)) or 'an empty list of targets'}")
    modules = dict(model.named_modules())
    return {n: modules[n] for n in names if any(matches(n, t) for t in targets)}


@dataclass(slots=True)
class _Seen:
    """Running sums of one module."""

    std: Tensor | None = None
    samples: int = 0
    squares: list[float] = field(default_factory=list)

    def add(self, moments: LogitMoments) -> None:
        std, used = moments.std()
        total = std[used].sum(0).cpu()
        self.std = total if self.std is None else self.std + total
        self.samples += int(used.sum())

    def result(self, name: str) -> ModuleStats:
        if self.std is None or not self.samples:
            raise ValueError(
                f"{name}: no attention logits were seen; it was not called, or it uses a kernel that has none "
                "(flash, flex, compiled): use scaled_dot_product_attention or eager attention while calibrating"
            )
        if not self.squares:
            raise ValueError(f"{name}: its output projection was never called, so there is no output to balance")
        rms = sum(self.squares) / len(self.squares)
        return ModuleStats(tuple((self.std / self.samples).tolist()), rms, len(self.squares))


class _Watch(TorchFunctionMode):
    """Sees the calls of attention and softmax within the modules that are watched."""

    def __init__(self, spread: Spread) -> None:
        super().__init__()
        self.spread = spread
        self.seen: dict[str, _Seen] = {}
        self.padding: Tensor | None = None
        self.rows: Tensor | None = None  # the padding mask, if the last attention was over the tokens that it marks
        self.inside: list[tuple[str, AttentionParts]] = []

    def enter(self, name: str, parts: AttentionParts) -> None:
        self.inside.append((name, parts))

    def leave(self) -> None:
        self.inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            name, parts = self.inside[-1]
            if func is nn.functional.scaled_dot_product_attention:
                self.seen[name].add(self.from_arguments(parts, *args, **kwargs))
            elif func in _SOFTMAX and args[0].is_floating_point():
                self.seen[name].add(self.from_logits(name, parts, args[0]))
        return func(*args, **kwargs)

    def from_arguments(
        self,
        parts: AttentionParts,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> LogitMoments:
        q, k = (t.reshape(-1, *t.shape[-3:]) if t.ndim != 4 else t for t in (query, key))
        mask = attn_mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask > MASKED
        if parts.heads and q.shape[1] != parts.heads and q.shape[1] * q.shape[2] == parts.heads:
            # transformers puts the heads of a group in the place of one query
            q = q.reshape(q.shape[0], parts.heads, 1, q.shape[3])
            if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
                mask = mask.reshape(mask.shape[0], parts.heads, 1, -1)
        moments = LogitMoments(self.spread)
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        keep = _and(mask, self.real_queries(mask, q.shape[2], k.shape[2]))
        add_products(moments, q, k, factor, keep, is_causal)
        return moments

    def from_logits(self, name: str, parts: AttentionParts, logits: Tensor) -> LogitMoments:
        if logits.ndim == 3:  # diffusers: [B * H, Q, K]
            if not parts.heads:
                raise ValueError(f"{name}: logits of shape {list(logits.shape)} and no attribute that gives the heads")
            logits = logits.unflatten(0, (-1, parts.heads))
        moments = LogitMoments(self.spread)
        mask = logits > MASKED
        moments.add(logits, _and(mask, self.real_queries(mask, *logits.shape[2:])))
        return moments

    def real_queries(self, mask: Tensor | None, queries: int, keys: int) -> Tensor | None:
        """[B, 1, Q, 1]: which queries are tokens, where this is self-attention over what the padding mask is about."""
        self.rows = None
        padding = self.padding
        if padding is None or mask is None or mask.ndim != 4 or queries != keys or padding.shape[1] != keys:
            return None
        if len(padding) % mask.shape[0] or (mask & ~padding[:, None, None, :]).any():
            return None  # another sequence of the same length: it uses what would be padding
        self.rows = padding
        return padding[:, None, :, None]

    def output(self, seen: _Seen) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
            rows = result.detach().double()
            if self.rows is not None and rows.shape[:-1] == self.rows.shape:
                rows = rows[self.rows]
            if rows.numel():
                seen.squares.append(float(rows.square().mean().sqrt()))

        return hook


_SOFTMAX = {nn.functional.softmax, torch.softmax, Tensor.softmax}


def _and(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a & b
