"""What the vision tower attends to while it encodes pictures, for the tokens that the language model gets of them."""

from __future__ import annotations

import contextvars
import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from eff_kernels.edit.attention import Attend, AttentionCall, AttentionOutput, column_sums, find_attention, rows
from torch import Tensor, nn

from eff_attention.grounded_attention.config import PAINTConfig, Saliency
from eff_attention.grounded_attention.functional import chosen

_KEPT = 4  # encoded pictures that wait for a prompt to be read


@dataclass
class Run:
    """Scores of patches in one run of a tower: a piece for each call of a layer, [tiles, N] or [1, N] packed."""

    first: list[Tensor] = field(default_factory=list)
    late: list[Tensor] = field(default_factory=list)
    received: list[Tensor] = field(default_factory=list)


_run: contextvars.ContextVar[Run | None] = contextvars.ContextVar("eff_paint_run", default=None)
_encoded: contextvars.ContextVar[tuple[Tensor, ...]] = contextvars.ContextVar("eff_paint_encoded", default=())


@dataclass(frozen=True)
class Tower:
    """Where a vision tower is.

    Attributes:
        names: Attention modules, one a layer.
        stem: The module that runs the layers.
        prefix: Tokens before the patches: class token and registers.
    """

    names: list[str]
    stem: str
    prefix: int


def find_tower(model: nn.Module, decoder: nn.Module) -> Tower:
    """The vision tower of a picture-language model.

    Raises:
        NotImplementedError: its attention cannot be found.
    """
    inside = {id(m) for m in decoder.modules()}
    stacks: dict[str, list[str]] = {}
    for found in find_attention(model):
        parts = found.name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if found.way and number is not None and id(found.module) not in inside:
            stacks.setdefault(".".join(parts[:number]), []).append(found.name)
    if len(stacks) != 1:
        raise NotImplementedError(f"{type(model).__name__} has {len(stacks)} stacks of vision attention, wanted 1")
    ((container, names),) = stacks.items()
    prefix = 0
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if id(model.get_submodule(name.rpartition(".")[0])) in inside:
            continue
        if leaf in ("class_embedding", "cls_token", "class_token"):
            prefix += 1
        elif leaf == "register_tokens":
            prefix += parameter.shape[-2]
    return Tower(names, container.rpartition(".")[0], prefix)


@dataclass(frozen=True)
class TowerWatch:
    """The rule of a layer of the tower: answers as the host does, and notes scores of patches.

    Attributes:
        place: Which list of a `Run` they go to.
        prefix: See `Tower`.
        saliency: See `PAINTConfig`.
        spatial: Whether to note what patches receive as well.
    """

    places: tuple[str, ...]
    prefix: int
    saliency: Saliency
    spatial: bool

    def __call__(self, call: AttentionCall, attend: Attend) -> AttentionOutput:
        """Answer a call."""
        output, run = attend(call), _run.get()
        if run is not None and not call.recomputed:
            with torch.no_grad():
                self._note(call, run)
        return output

    def _note(self, call: AttentionCall, run: Run) -> None:
        if call.extra.get("cu_seq_lens_q") is not None:
            raise NotImplementedError(
                f"{call.name} has several pictures in one sequence; choose another attention for it, such as "
                "model.set_attn_implementation({'vision_config': 'sdpa'})"
            )
        received = None
        if self.saliency == "received" or self.spatial:
            received = column_sums(call, q_index=slice(self.prefix, None)).mean(1)[:, self.prefix :]
        score = received if self.saliency == "received" else rows(call, [0]).sum(1)[:, 0, self.prefix :]
        for place in self.places:
            getattr(run, place).append(score)
        if self.spatial and "first" in self.places:
            run.received.append(received)  # type: ignore[arg-type]


class Encoder:
    """``get_image_features`` of a model that chooses informed tokens while it encodes."""

    def __init__(self, module: Any, stem: str, config: PAINTConfig) -> None:
        self.module, self.stem, self.config = module, stem, config

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the module's own, which ``generate`` asks for."""
        kind: Any = type(self.module)
        own = inspect.signature(kind.get_image_features)
        return own.replace(parameters=list(own.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Encode pictures."""
        kind: Any = type(self.module)
        run = Run()
        token = _run.set(run)
        try:
            out = kind.get_image_features(self.module, *args, **kwargs)
        finally:
            _run.reset(token)
        names = list(inspect.signature(inspect.unwrap(kind.get_image_features)).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        features = getattr(out, "pooler_output", out)
        chosen_tokens = self._chosen(run, [len(f) for f in features], given)
        _encoded.set((*_encoded.get()[1 - _KEPT :], chosen_tokens))
        return out

    def _chosen(self, run: Run, lengths: list[int], given: dict[str, Any]) -> Tensor:
        """Local and summary tokens of all pictures, bool [2, tokens]."""
        if (grids := given.get("image_grid_thw")) is not None:
            return self._packed(run, lengths, torch.as_tensor(grids))
        first, late, received = (torch.cat(x) if x else None for x in (run.first, run.late, run.received))
        if first is None or late is None:
            raise NotImplementedError("the vision tower attended to nothing while pictures were encoded")
        if given.get("image_sizes") is not None and getattr(self.module.config, "image_grid_pinpoints", None):
            local, summary = chosen(first, late, received, self.config)
            pair = torch.stack([local, summary], 1)  # [tiles, 2, N]
            found = self._tiles(pair, torch.as_tensor(given["image_sizes"]).tolist())
            if [f.shape[1] for f in found] != lengths:
                raise NotImplementedError(
                    f"pictures have {lengths} tokens, {[f.shape[1] for f in found]} are known by their tiles"
                )
            return torch.cat(found, 1)
        tiles, patches = first.shape
        count = sum(lengths) // tiles
        scores = [None if x is None else _pooled(x, count) for x in (first, late, received)]
        if count * tiles != sum(lengths) or scores[0] is None or scores[1] is None:
            raise NotImplementedError(
                f"pictures have {lengths} tokens of {tiles} x {patches} patches; wanted equal blocks"
            )
        local, summary = chosen(scores[0], scores[1], scores[2], self.config)
        return torch.stack([local.flatten(), summary.flatten()])

    def _tiles(self, pair: Tensor, sizes: list[list[int]]) -> list[Tensor]:
        """LLaVA-NeXT: the whole picture, then the lines of its tiles without padding, each with a separator."""
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

        config = self.module.config
        found, at = [], 0
        for size in sizes:
            down, across = get_anyres_image_grid_shape(
                size, config.image_grid_pinpoints, config.vision_config.image_size
            )
            whole, parts = pair[at], pair[at + 1 : at + 1 + down * across]
            at += 1 + down * across
            side = math.isqrt(whole.shape[-1])
            large = parts.reshape(down, across, 2, side, side).permute(2, 0, 3, 1, 4)
            large = unpad_image(large.reshape(2, down * side, across * side), tuple(size))
            lines = torch.nn.functional.pad(large, (0, 1)).flatten(1)
            found.append(torch.cat([whole, lines], 1))
        return found

    def _packed(self, run: Run, lengths: list[int], grids: Tensor) -> Tensor:
        """Qwen's towers: all patches in one line, those of a token side by side; some towers put windows together."""
        tower = self.module.get_submodule(self.stem)
        merge = int(tower.spatial_merge_size) ** 2
        order = None
        if getattr(tower, "fullatt_block_indexes", None) is not None and hasattr(tower, "window_size"):
            from transformers.vision_utils import get_vision_window_index

            order, _ = get_vision_window_index(
                grids,
                spatial_merge_size=tower.spatial_merge_size,
                window_size=tower.window_size,
                patch_size=tower.patch_size,
            )
        scores = []
        for pieces in (run.first, run.late, run.received):
            if not pieces:
                scores.append([None] * len(lengths))
                continue
            tokens = torch.cat(pieces, 1)[0].unflatten(0, (-1, merge)).amax(1)
            if order is not None:
                tokens = torch.empty_like(tokens).index_copy(0, order.to(tokens.device), tokens)
            scores.append(list(tokens.split(lengths)))
        found = [
            torch.stack(chosen(first, late, received, self.config))
            for first, late, received in zip(*scores, strict=True)
        ]
        return torch.cat(found, 1)


def take_encoded(counts: Tensor) -> Tensor | None:
    """Chosen tokens for the picture tokens of a prompt, from pictures that this thread has encoded before.

    Args:
        counts: Picture tokens of each row, int64 [B]; a prompt may have several rows side by side (beams).

    Returns:
        bool [2, tokens of all rows], or None if nothing fits.
    """
    held, numbers = _encoded.get(), counts.tolist()
    _encoded.set(())
    for several in range(1, len(held) + 1):
        ready = torch.cat(held[-several:], 1)
        size = ready.shape[1]
        if size and sum(numbers) % size == 0:
            times = sum(numbers) // size
            own = numbers[::times]
            if [n for n in own for _ in range(times)] == numbers and sum(own) == size:
                parts = ready.split(own, 1)
                return torch.cat([part for part in parts for _ in range(times)], 1)
    return None


def _pooled(score: Tensor, count: int) -> Tensor | None:
    """The largest score of the patches of each token: [tiles, N] to [tiles, count], or None if they are no blocks."""
    side, small = math.isqrt(score.shape[1]), math.isqrt(count)
    if score.shape[1] == count:
        return score
    if not count or side * side != score.shape[1] or small * small != count or side % small:
        return None
    block = side // small
    return score.reshape(-1, small, block, small, block).amax((2, 4)).flatten(1)
