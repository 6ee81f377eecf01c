"""Statistics of attention that QuantVLA matches: spread of the logits by head, energy behind the output projection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eff_kernels.edit import ModuleCall, Run, calibrate, matches
from eff_kernels.edit.attention import AttentionCall, AttentionOutput, observe_attention
from eff_kernels.edit.attention.explicit import logits
from torch import Tensor, nn

from eff_quant.quantvla.attention import attention_parts
from eff_quant.quantvla.moments import MASKED, LogitMoments, Spread


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

    The logits are taken where they are used, after norms, rotary embedding and the cache, softcap and position bias
    included, and computed in float32 in blocks. Masked pairs and padding do not count. Attention is seen as by
    `eff_kernels.edit.attention.observe_attention`: of transformers, of diffusers, and of modules that call
    ``scaled_dot_product_attention``. Projections of queries and outputs have to be separate.

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
        RuntimeError: a module computes its softmax by hand, where nothing can be seen.
    """
    if std not in ("global", "row"):
        raise ValueError(f"std={std!r}; use 'global' or 'row'")
    modules = find_attention(model, targets)
    seen = {name: _Seen(std) for name in modules}
    names = {m: name for name, m in model.named_modules()}
    look: dict[str, Callable[[ModuleCall], None]] = {
        names[attention_parts(name, module).out]: seen[name].see_output for name, module in modules.items()
    }

    def record(call: AttentionCall, output: AttentionOutput) -> None:
        seen[call.name].calls.append(call)

    with observe_attention(model, record, where=lambda name, module: name in modules, own_thread=True, strict=True):
        calibrate(model, batches, look, run=run, seed=seed)
    return AttentionStats({name: s.result(name) for name, s in seen.items()}, std)


def find_attention(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """The attention modules that the patterns select, by name.

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

    spread: Spread
    std: Tensor | None = None
    samples: int = 0
    squares: list[float] = field(default_factory=list)
    calls: list[AttentionCall] = field(default_factory=list)  # those whose output has still to be projected

    def see_output(self, projection: ModuleCall) -> None:
        """The output projection ran, after one attention or the two of a joint stream."""
        rows = projection.output.detach().double()
        for call in self.calls:
            real = _real_queries(call, projection.padding)
            self._add(call, real)
            if real is not None and rows.shape[:-1] == real.shape:
                rows = rows[real]
        self.calls.clear()
        if rows.numel():
            self.squares.append(float(rows.square().mean().sqrt()))

    def _add(self, call: AttentionCall, real: Tensor | None) -> None:
        moments = LogitMoments(self.spread)
        for part, block in logits(call):
            keep = block > MASKED
            if real is not None:
                keep = keep & real[:, None, part.rows, None]
            moments.add(block, keep)
        std, used = moments.std()
        total = std[used].sum(0).cpu()
        self.std = total if self.std is None else self.std + total
        self.samples += int(used.sum())

    def result(self, name: str) -> ModuleStats:
        if self.std is None or not self.samples:
            raise ValueError(f"{name}: saw no attention logits and output projection; was the module called?")
        rms = sum(self.squares) / len(self.squares)
        return ModuleStats(tuple((self.std / self.samples).tolist()), rms, len(self.squares))


def _real_queries(call: AttentionCall, padding: Tensor | None) -> Tensor | None:
    """Which queries [B, Q] are tokens, where this is self-attention over what the padding mask [B, T] is about."""
    if padding is None or call.num_queries != call.num_keys or padding.shape != (len(call.q), call.num_keys):
        return None
    padding = padding.to(call.q.device)
    if (call.keep_mask() & ~padding[:, None, None, :]).any():
        return None  # another sequence of the same length: it uses what would be padding
    return padding
