"""Maps between words and patches from the joint attention of a diffusion transformer, while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self, get_args

import torch
from eff_kernels.edit import Handle
from eff_kernels.edit.attention import AttentionCall, columns, joint_attention, observe_attention, rows
from eff_kernels.edit.attention.diffusers import leaves_padding
from torch import Tensor, nn

from eff_guidance.denoiser import check_whole
from eff_guidance.refam.config import Direction, Normalize

_ENTRIES = 2**24  # of a block of logits

SUPPORTED = ("FluxTransformer2DModel", "SD3Transformer2DModel", "MochiTransformer3DModel")


def text_share(logits: Tensor, valid: Tensor) -> Tensor:
    """Softmax over the tokens that are no padding.

    Args:
        logits: [..., T].
        valid: bool, broadcasts to ``logits``.

    Returns:
        Like ``logits``; 0 at padding, and all 0 where nothing is valid.
    """
    hidden = logits.masked_fill(~valid, -torch.inf)
    empty = ~(hidden > -torch.inf).any(-1, keepdim=True)
    return hidden.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty | ~valid, 0.0)


def default_blocks(transformer: nn.Module) -> tuple[str, ...]:
    """Attention modules whose maps show objects best.

    Of FLUX the second half of the double blocks and the first half of the single ones; of others the last 40 %. Where
    maps turn sharp is measured in the paper for Mochi, the rest is a choice of this package.
    """
    names = _joint(transformer)
    single = [n for n in names if "single" in n]
    double = [n for n in names if "single" not in n]
    start = -(-len(double) // 2) if single else int(0.6 * len(double))
    return (*double[start:], *single[: -(-len(single) // 2)])


def capture_joint_attention(
    transformer: nn.Module,
    blocks: Sequence[str] | None = None,
    *,
    valid: Tensor | None = None,
    normalize: Normalize = "text",
    direction: Direction = "image_to_text",
) -> JointAttention:
    """Watch the joint attention of a transformer, for as long as the result is entered.

    Its output stays bit-identical. The maps are means over heads, and over the calls if there are several. Calls from
    other threads than the one that entered are not looked at.

    Args:
        transformer: FLUX's, SD3's or Mochi's transformer of diffusers, or another with joint attention.
        blocks: Names of blocks or of their attention modules; None for `default_blocks`.
        valid: Which text tokens are no padding, bool [T] or [B, T]; None if all are. Mochi needs it.
        normalize: "text": softmax among the valid tokens (or among the patches); "joint": weights of the whole
            attention. Padding gets 0 in both.
        direction: Which are the queries, patches ("image_to_text") or words ("text_to_image").

    Raises:
        ValueError: the model has no joint attention, a block does not exist, or a choice is unknown.
    """
    if normalize not in get_args(Normalize) or direction not in get_args(Direction):
        raise ValueError(
            f"normalize={normalize!r}, direction={direction!r}; "
            f"use one of {get_args(Normalize)} and one of {get_args(Direction)}"
        )
    names = default_blocks(transformer) if blocks is None else _named(transformer, blocks)
    return JointAttention(transformer, names, valid, normalize, direction)


class JointAttention:
    """What `capture_joint_attention` finds.

    Attributes:
        maps: By attention module, how much patch n and token t belong together, float32 [B, N, T].
        text_to_text: By attention module, softmax among valid tokens, rows are queries, float32 [B, T, T].
    """

    def __init__(
        self,
        transformer: nn.Module,
        names: tuple[str, ...],
        valid: Tensor | None,
        normalize: Normalize,
        direction: Direction,
    ) -> None:
        self.maps: dict[str, Tensor] = {}
        self.text_to_text: dict[str, Tensor] = {}
        self._transformer, self._names = transformer, names
        self._valid = None if valid is None else valid if valid.dim() == 2 else valid[None]
        self._normalize, self._direction = normalize, direction
        self._counts: dict[str, int] = {}
        self._waiting: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._handle: Handle | None = None

    def __enter__(self) -> Self:
        if self._handle is not None:
            raise RuntimeError("this capture is entered already")
        self._handle = observe_attention(
            self._transformer, self._record, where=self._names, own_thread=True, strict=True
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()

    def remove(self) -> None:
        """Stop watching; the maps stay. May be called again."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def mean(self) -> tuple[Tensor, Tensor]:
        """Means over the blocks: maps [B, N, T] and text to text [B, T, T].

        Raises:
            RuntimeError: the transformer has not run.
        """
        if not self.maps:
            raise RuntimeError("nothing was captured: run the transformer inside of the context")
        return torch.stack([*self.maps.values()]).mean(0), torch.stack([*self.text_to_text.values()]).mean(0)

    def _record(self, call: AttentionCall, output: Any) -> None:
        check_whole(call.module)
        if call.streams is None:
            return
        if not leaves_padding(call.module):
            self._add(call.name, *self._measure(call, self._valid))
            return
        if self._valid is None:
            raise ValueError(f"{call.name} leaves padding out of its text; tell which tokens are valid")
        waiting = self._waiting.setdefault(call.name, [])
        at = self._valid[len(waiting)].nonzero()[:, 0].to(call.q.device)
        maps, text = self._measure(call, None)
        wide = maps.new_zeros(*maps.shape[:2], self._valid.shape[1])
        square = text.new_zeros(1, *[self._valid.shape[1]] * 2)
        wide[..., at] = maps
        square[0, at[:, None], at] = text[0]
        waiting.append((wide, square))
        if len(waiting) == len(self._valid):
            self._add(call.name, *(torch.cat(part) for part in zip(*waiting, strict=True)))
            waiting.clear()

    def _measure(self, call: AttentionCall, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        assert call.streams is not None
        image, text = call.streams["image"], call.streams["text"]
        count = text.stop - text.start
        if valid is None:
            valid = torch.ones(1, count, dtype=torch.bool)
        if valid.shape[1] != count or valid.shape[0] not in (1, call.q.shape[0]):
            raise ValueError(
                f"valid is {list(valid.shape)}, the text has {count} tokens in a batch of {call.q.shape[0]}"
            )
        keep = valid.to(call.q.device)
        if self._normalize == "joint":
            if self._direction == "image_to_text":
                maps = columns(call, range(text.start, text.stop))[:, :, image].mean(1)
            else:
                maps = rows(call, text)[..., image].mean(1).mT
        else:
            maps = torch.zeros(call.q.shape[0], image.stop - image.start, count, device=call.q.device)
            for logits in _logits(call, image, text, swap=self._direction == "text_to_image"):
                kept = keep[:, None, None] if self._direction == "image_to_text" else torch.ones_like(keep[:1, :1])
                prob = text_share(logits, kept).sum(1)
                maps += prob if self._direction == "image_to_text" else prob.mT
            maps /= call.num_heads
        square = torch.zeros(call.q.shape[0], count, count, device=call.q.device)
        for logits in _logits(call, text, text):
            square += text_share(logits, keep[:, None, None]).sum(1)
        return maps * keep[:, None], square / call.num_heads * keep[:, :, None]

    def _add(self, name: str, maps: Tensor, text: Tensor) -> None:
        n = self._counts[name] = self._counts.get(name, 0) + 1
        for held, new in ((self.maps, maps), (self.text_to_text, text)):
            held[name] = new if n == 1 else held[name] + (new - held[name]) / n


def _logits(call: AttentionCall, queries: slice, keys: slice, *, swap: bool = False) -> Iterator[Tensor]:
    """Float32 logits [B, h, q, k] of one stream towards another, a few heads at a time; ``swap`` swaps the roles."""
    if swap:
        queries, keys = keys, queries
    size = call.q.shape[0] * (queries.stop - queries.start) * (keys.stop - keys.start)
    step = max(1, _ENTRIES // max(1, size))
    for first in range(0, call.num_heads, step):
        heads = slice(first, first + step)
        with torch.autocast(call.q.device.type, enabled=False):
            yield call.q[:, heads, queries].float() @ call.k[:, heads, keys].float().mT * call.scale


def _joint(transformer: nn.Module) -> list[str]:
    if not (names := joint_attention(transformer)):
        raise ValueError(
            f"{type(transformer).__name__} has no joint attention of text and picture; models that have are "
            f"{', '.join(SUPPORTED)}"
        )
    return names


def _named(transformer: nn.Module, blocks: Sequence[str]) -> tuple[str, ...]:
    if isinstance(blocks, str):
        raise TypeError(f"blocks={blocks!r} is one string; use a sequence, such as [{blocks!r}]")
    names, found = _joint(transformer), []
    for block in blocks:
        own = [n for n in names if n == block or n.rpartition(".")[0] == block]
        if not own:
            raise ValueError(f"no block {block!r} with joint attention; there are {', '.join(names)}")
        found += own
    if not found:
        raise ValueError("blocks is empty")
    return tuple(dict.fromkeys(found))
