"""Which token shows which part of which picture, for the families of picture-language models in transformers.

Picture tokens of a batch come in the order of its pictures. How many one picture has and how they lie on its grid
depends on the family, which shows in the config and in the arguments of the call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from eff_kernels.edit.attention.transformers import tiled_grid

Cell = tuple[int, int, int]  # part, line and column; -1 for a token that shows no place


def token_ids(config: Any) -> tuple[int, ...]:
    """Ids of the tokens that stand for pictures and videos in a model with this config."""
    found = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    return tuple(i for i in found if isinstance(i, int))


def tokens_told(name: str, sizes: Tensor, config: Any) -> int:
    """How many tokens the pictures or videos have whose sizes an argument such as "image_grid_thw" tells."""
    kind = name.partition("_")[0]
    return sum(len(cells) for cells in _layouts(kind, config, {name: sizes}) or ())


def tokens_shown(name: str, ids: Tensor, config: Any) -> int:
    """How many of the ids stand for what that argument tells of."""
    token = getattr(config, f"{name.partition('_')[0]}_token_id", None)
    return int((ids == token).sum()) if isinstance(token, int) else 0


def places(ids: Tensor, config: Any, arguments: Mapping[str, Any]) -> Tensor:
    """Picture, part, line and column of each token, int32 [4, B, S]; -1 for tokens of no picture.

    Args:
        ids: Token ids from the beginning of the sequence on, int64 [B, S].
        config: The config of the model that joins pictures and text.
        arguments: What the model was called with: ``image_grid_thw``, ``video_grid_thw``, ``image_sizes``.
    """
    known = [_layouts(kind, config, arguments) for kind in ("image", "video")]
    out = []
    for line in ids.tolist():
        pictures: list[list[tuple[int, Cell]]] = []
        for token, cells in zip(token_ids(config), known, strict=False):
            runs = _runs(line, token)
            pictures += _sized(runs, cells) if cells is not None else _by_runs(runs, line, config)
        row = [(-1, -1, -1, -1)] * len(line)
        for number, picture in enumerate(sorted(pictures)):
            for position, cell in picture:
                row[position] = (number, *cell)
        out.append(row)
    return torch.tensor(out, dtype=torch.int32, device=ids.device).permute(2, 0, 1)


def _runs(line: list[int], token: int) -> list[range]:
    runs: list[range] = []
    for position, this in enumerate(line):
        if this != token:
            continue
        if runs and runs[-1].stop == position:
            runs[-1] = range(runs[-1].start, position + 1)
        else:
            runs.append(range(position, position + 1))
    return runs


def _layouts(kind: str, config: Any, arguments: Mapping[str, Any]) -> Iterator[list[Cell]] | None:
    """The cells of one picture after the other, where the arguments tell their sizes."""
    vision: Any = getattr(config, "vision_config", None)
    if (grids := arguments.get(f"{kind}_grid_thw")) is not None:
        merge = getattr(vision, "spatial_merge_size", 1)
        return iter([_grid(h // merge, w // merge, range(t)) for t, h, w in torch.as_tensor(grids).tolist()])
    sizes = arguments.get("image_sizes")
    if sizes is None or kind != "image":
        return None
    sizes = torch.as_tensor(sizes).tolist()
    if getattr(config, "image_grid_pinpoints", None):
        return iter([_tiled(config, size) for size in sizes])
    patch = vision.patch_size * getattr(config, "spatial_merge_size", 1)
    return iter([_grid(h // patch, w // patch) for h, w in sizes])


def _grid(height: int, width: int, parts: range = range(1)) -> list[Cell]:
    return [(p, y, x) for p in parts for y in range(height) for x in range(width)]


def _tiled(config: Any, size: list[int]) -> list[Cell]:
    """LLaVA-NeXT: the whole picture small as part 0, then the large one as part 1 with a separator after each line."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    height, width = tiled_grid(config, size)
    lines = [[*((1, y, x) for x in range(width)), (1, y, -1)] for y in range(height)]
    return [*_grid(side, side), *(cell for line in lines for cell in line)]


def _sized(runs: list[range], layouts: Iterator[list[Cell]]) -> Iterator[list[tuple[int, Cell]]]:
    """Positions of one row with the cells of its pictures; a row takes as many pictures as it has tokens for."""
    positions = [p for run in runs for p in run]
    while positions:
        cells = next(layouts, None)
        if cells is None:
            cells = [(-1, -1, -1)] * len(positions)
        here, positions = positions[: len(cells)], positions[len(cells) :]
        yield list(zip(here, cells, strict=False))


def _by_runs(runs: list[range], line: list[int], config: Any) -> Iterator[list[tuple[int, Cell]]]:
    """Families whose pictures, or parts of them, mostly have the number of tokens that the config tells."""
    kind = str(getattr(config, "model_type", ""))
    count = _tokens_of_part(config)
    if kind in ("idefics3", "smolvlm"):
        yield from _cut_with_marks(runs, line, count)
    elif kind == "internvl":
        yield from (_parts(run, count) for run in runs)
    else:
        extra = _class_token(config)
        for run in runs:
            # A processor may make pictures of another size than the config tells: then each run is one of them.
            step = count + extra if count and len(run) % (count + extra) == 0 else len(run)
            for start in range(run.start, run.stop, step):
                cells: list[Cell] = [(0, -1, -1)] * extra + _square(step - extra, 0)
                yield list(zip(range(start, start + step), cells, strict=True))


def _parts(run: range, count: int) -> list[tuple[int, Cell]]:
    """InternVL: all parts in one run, the last one the whole picture if there are several."""
    parts = math.ceil(len(run) / count)
    order = [0] if parts == 1 else [*range(1, parts), 0]
    return list(zip(run, (cell for part in order for cell in _square(count, part)), strict=False))


def _cut_with_marks(runs: list[range], line: list[int], count: int) -> Iterator[list[tuple[int, Cell]]]:
    """Idefics3: each part in its own run; the token before the run of the whole picture ends the picture."""
    marks = [line[run.start - 1] if run.start else -1 for run in runs]
    picture: list[tuple[int, Cell]] = []
    part = 1
    for run, mark in zip(runs, marks, strict=True):
        whole = mark == marks[-1]
        picture += zip(run, _square(count, 0 if whole else part), strict=False)
        part += 1
        if whole:
            yield picture
            picture, part = [], 1


def _square(count: int, part: int) -> list[Cell]:
    side = math.isqrt(count)
    return _grid(side, side, range(part, part + 1)) if side * side == count else [(part, -1, -1)] * count


def _tokens_of_part(config: Any) -> int:
    """Tokens of a picture, or of a part of one, where the config tells; else 0."""
    vision = getattr(config, "vision_config", None)
    if isinstance(fixed := getattr(config, "mm_tokens_per_image", None), int):
        return fixed
    sides = [getattr(vision, n, None) for n in ("image_size", "patch_size")]
    size, patch = (s[0] if isinstance(s, (list, tuple)) else s for s in sides)
    if not isinstance(size, int) or not isinstance(patch, int):
        return 0
    shrink = getattr(config, "scale_factor", None) or 1 / getattr(config, "downsample_ratio", 1)
    return int(size // patch / shrink) ** 2


def _class_token(config: Any) -> int:
    return int(getattr(config, "vision_feature_select_strategy", None) == "full")
