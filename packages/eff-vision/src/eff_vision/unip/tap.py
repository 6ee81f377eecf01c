"""Reading the attention of chosen layers of any vision transformer, with gradients where they are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Literal

from eff_kernels.edit import Handle
from eff_kernels.edit.attention import AttentionCall, AttentionOutput, find_attention, observe_attention
from torch import Tensor, nn


class AttentionTap:
    """A context in which the attention of some layers is kept: ``tap[layer]`` after each forward of the same thread.

    Logits are those that enter the softmax, after rotary and relative positions and norms of queries and keys. The
    model's output stays bit-identical.

    Args:
        model: A vision transformer of timm, transformers or one's own.
        layers: Which of its attention layers, in its order; negative ones count from the last. None for all.
        kind: "logits" or "probs".
        grad: Whether gradients may flow through what is kept.

    Raises:
        IndexError: there is no such layer.
        ValueError: the attention of a layer cannot be reached.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] | None = None,
        *,
        kind: Literal["logits", "probs"] = "probs",
        grad: bool = False,
    ) -> None:
        if kind not in ("logits", "probs"):
            raise ValueError(f"kind must be 'logits' or 'probs', got {kind!r}")
        known = find_attention(model)
        inside = tuple(f"{f.name}." for f in known)
        # Without attention inside of another, which answers for it, such as sparse-linear's.
        found = [f for f in known if not f.name.startswith(inside)]
        if not found:
            raise ValueError(f"no attention was found in {type(model).__name__}")
        self.num_layers = len(found)
        self.layers = [range(len(found))[i] for i in (range(len(found)) if layers is None else layers)]
        self._index = {found[i].name: i for i in self.layers}
        self._model, self._kind, self._grad = model, kind, grad
        self._kept: dict[int, Tensor] = {}
        self._handle: Handle | None = None

    def __enter__(self) -> AttentionTap:
        names = list(self._index)
        self._handle = observe_attention(
            self._model, self._record, where=names, grad=self._grad, own_thread=True, strict=True
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._handle is not None:
            self._handle.remove()

    def __getitem__(self, layer: int) -> Tensor:
        """What was kept of a layer in the last forward, [B, heads, N, N] in float32."""
        return self._kept[range(self.num_layers)[layer]]

    def _record(self, call: AttentionCall, output: AttentionOutput) -> None:
        logits = call.q.float() @ _repeated(call.k, call.num_heads).float().mT * call.scale
        if call.mask is not None or call.bias is not None or call.causal:
            logits = logits + call.additive_mask()
        self._kept[self._index[call.name]] = logits if self._kind == "logits" else logits.softmax(-1)


def _repeated(key: Tensor, heads: int) -> Tensor:
    return key if key.size(1) == heads else key.repeat_interleave(heads // key.size(1), 1)
