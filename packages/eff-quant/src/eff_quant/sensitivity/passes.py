"""Running a model with some of its linear layers rounded, from the first block on that this changes.

What is exact: a block before the first changed one gets the same input as in an earlier run, so its output is taken
from there, bit for bit. `Runner` compares the two on the first window before it relies on it, which finds models whose
blocks share more than their hidden states.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from eff_kernels.edit import Handle
from torch import Tensor, nn

from eff_quant.sensitivity.fake import FakeLinear, Inputs, Weights, bias_of, weight_of
from eff_quant.sensitivity.parts import Parts
from eff_quant.sensitivity.score import Score, score


@dataclass(slots=True)
class Snapshot:
    """Hidden states behind blocks of one run: ``after[window][block]``, every so many blocks and behind the last."""

    formats: Mapping[str, str]
    every: int
    after: list[dict[int, Tensor]] = field(default_factory=list)


class Runner:
    """One model on one choice of windows.

    Args:
        model: Left as it is; layers are exchanged for the time of a run.
        windows: Token ids, each [T].
        parts: Blocks and layers of the model.
        weights, activations: What a format applies to.
        cache_bytes: For hidden states of the base and of one other run, logits of the base, and rounded weights, a
            quarter each. What does not fit is computed again.
    """

    def __init__(
        self,
        model: nn.Module,
        windows: Sequence[Tensor],
        parts: Parts,
        *,
        weights: bool = True,
        activations: bool = True,
        cache_bytes: int = 2**31,
    ) -> None:
        self.model, self.windows, self.parts = model, windows, parts
        self.weights, self.activations = weights, activations
        self.inputs = Inputs()
        self.blocks = [model.get_submodule(name) for name in parts.blocks]
        self._budget = cache_bytes // 4
        self._rounded = Weights(self._budget)
        self._modules = {p.name: p.module for p in parts.linears}
        self._block_of = {p.name: p.block for p in parts.linears}
        self._snapshots: list[Snapshot] = []  # of the base, and of the latest run that was to be kept
        self._logits: dict[int, Tensor] = {}
        self._wrap: Callable[[Tensor], Any] | None = None
        self.skips = True
        takes = inspect.signature(model.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in takes else {}

    @torch.no_grad()
    def run(self, formats: Mapping[str, str], *, keep: bool = False) -> Score:
        """Score the model with layers rounded.

        Args:
            formats: A format for each layer, by name, that is not to stay as it is.
            keep: Keep this run's hidden states, for runs that differ from it only in late blocks.
        """
        self.prepare()
        kept = Snapshot(dict(formats), self._snapshots[0].every) if keep and self.skips else None
        nll: list[float] = []
        kl: list[float] = []
        with Handle() as handle:
            self.exchange(formats, handle)
            for i, ids in enumerate(self.windows):
                one = score(self._logits_of(i, formats, kept), self._base_logits(i), ids)
                nll += one.nll
                kl += one.kl
        if kept is not None:
            self._snapshots[1:] = [kept]
        return Score(tuple(nll), tuple(kl))

    def hold(self, formats: Mapping[str, str]) -> None:
        """Have the hidden states of a run at hand that later runs differ from in late blocks only."""
        if self.skips and all(s.formats != formats for s in self._snapshots[1:]):
            self.run(formats, keep=True)

    @torch.no_grad()
    def prepare(self) -> None:
        """Run the model as it is and keep what later runs need; a second call does nothing."""
        if self._snapshots or self._logits:
            return
        base = Snapshot({}, 1)
        used = 0
        for i in range(len(self.windows)):
            logits = self._logits_of(i, {}, base if self.skips else None)
            if i == 0:
                self.skips = self._may_skip(base, logits)
            used += logits.numel() * logits.element_size()
            if used <= self._budget or not self.skips:
                self._logits[i] = logits
        if self.skips:
            self._snapshots = [base]

    def call(self, ids: Tensor) -> Tensor:
        """Run the model as it stands on token ids [T]: logits [T, V]."""
        out = self.model(ids[None], **self._options)
        logits = getattr(out, "logits", None)
        if logits is None:
            logits = out[0] if isinstance(out, tuple) else out
        return logits[0]

    def exchange(self, formats: Mapping[str, str], handle: Handle) -> None:
        """Put rounded layers in place until the handle is removed."""
        handle.on_remove(self.inputs.forget)
        for name, format in formats.items():
            handle.replace(self.model, name, self.rounded(name, format))

    def rounded(self, name: str, format: str) -> FakeLinear:
        """A layer in a format."""
        module = self._modules[name]
        weight = self._rounded(module, format) if self.weights else weight_of(module)
        return FakeLinear(weight, bias_of(module), self.inputs, format if self.activations else None)

    def _logits_of(self, window: int, formats: Mapping[str, str], keep: Snapshot | None = None) -> Tensor:
        """Logits [T, V] of one window with the layers that are in place, which are those of ``formats``."""
        start, hidden, before = 0, None, {}
        for known in self._snapshots:
            first = self._first_changed(known, formats)
            if first > start:
                start, before = first, known.after[window]
                hidden = before[start - 1]
        with Handle() as handle:
            if hidden is not None:
                self._skip_before(start, hidden, handle)
            if keep is not None:
                keep.after.append({block: h for block, h in before.items() if block < start})
                self._record(keep, start, handle)
            return self.call(self.windows[window])

    def _first_changed(self, known: Snapshot, formats: Mapping[str, str]) -> int:
        """The block at which a run has to begin that differs from a known one: 0 is the first of all."""
        names = {*formats, *known.formats}
        changed = [self._block_of[n] for n in names if formats.get(n) != known.formats.get(n)]
        return min(changed) // known.every * known.every if changed else len(self.blocks)

    def _base_logits(self, window: int) -> Tensor:
        if window in self._logits:
            return self._logits[window]
        return self._logits_of(window, {})  # from behind the last block of the base, whatever layers are in place

    def _may_skip(self, base: Snapshot, expected: Tensor) -> bool:
        """Whether runs that begin late give exactly the logits of the whole run."""
        blocks = sorted(base.after[0])
        if self._wrap is None or not blocks:
            return False
        self.call(self.windows[0].flip(0))  # so that nothing of the window is left behind anywhere
        for block in {blocks[0], *blocks[-2:]}:
            with Handle() as handle:
                self._skip_before(block + 1, base.after[0][block], handle)
                try:
                    found = self.call(self.windows[0])
                except Exception:  # a block that misses what an earlier one leaves behind may raise anything
                    return False
                if not torch.equal(found, expected):
                    return False
        return True

    def _record(self, snapshot: Snapshot, start: int, handle: Handle) -> None:
        """Keep outputs of blocks in the window that runs next."""
        after, last = snapshot.after[-1], len(self.blocks) - 1
        first_window = len(snapshot.after) == 1 and not self._snapshots

        def keep(i: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self._learn_wrap(output)
                if self._wrap is None:
                    return
                hidden = output[0] if isinstance(output, tuple) else output
                if first_window and i == 0:
                    snapshot.every = self._stride(hidden)
                if (i + 1) % snapshot.every == 0 or i == last:
                    after[i] = hidden

            return hook

        for i, block in enumerate(self.blocks[start:], start):
            handle.on_remove(block.register_forward_hook(keep(i)).remove)

    def _stride(self, hidden: Tensor) -> int:
        """Keep so many blocks apart that all windows fit; those behind the last block are kept in any case."""
        tokens = sum(len(w) for w in self.windows)
        room = self._budget // (hidden.shape[-1] * hidden.element_size() * tokens)
        return -(-len(self.blocks) // room) if room else len(self.blocks) + 1

    def _learn_wrap(self, output: Any) -> None:
        """How a block returns hidden states: as they are, or first in a tuple that holds no other tensor."""
        self._wrap = None
        if isinstance(output, Tensor):
            self._wrap = lambda hidden: hidden
        elif isinstance(output, tuple) and not any(isinstance(v, Tensor) for v in output[1:]):
            rest = output[1:]
            self._wrap = lambda hidden: (hidden, *rest)

    def _skip_before(self, start: int, hidden: Tensor, handle: Handle) -> None:
        """Let the blocks before ``start`` return hidden states that are known, without computing anything."""
        if self._wrap is None:
            raise RuntimeError("blocks cannot be skipped: they return more than their hidden states")
        out = self._wrap(hidden)
        for block in self.blocks[:start]:
            _set_forward(block, lambda *args, **kwargs: out, handle)


def _set_forward(module: nn.Module, forward: Callable[..., Any], handle: Handle) -> None:
    before = module.__dict__.get("forward")

    def put_back() -> None:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before

    module.__dict__["forward"] = forward
    handle.on_remove(put_back)
