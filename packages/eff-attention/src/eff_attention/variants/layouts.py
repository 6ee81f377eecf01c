"""Which layers of a hybrid keep standard attention. Layers are counted from 1, as in the paper."""

from __future__ import annotations

from collections.abc import Callable, Iterable

LAYOUTS: dict[str, tuple[int, Callable[[int], Iterable[int]]]] = {
    "uniform": (1, lambda n: ()),
    "even": (2, lambda n: range(2, n + 1, 2)),
    "odd": (2, lambda n: range(1, n + 1, 2)),
    "top": (2, lambda n: range(1, n // 2 + 1)),
    "middle": (4, lambda n: [*range(1, n // 4 + 1), *range(3 * n // 4 + 1, n + 1)]),
    "bottom": (2, lambda n: range(n // 2 + 1, n + 1)),
    "quarter": (4, lambda n: range(4, n + 1, 4)),
    "first": (1, lambda n: (1,)),
    "last": (1, lambda n: (n,)),
    "bilateral": (2, lambda n: (1, n)),
}
"""Name -> (what must divide the depth, standard layers of a depth). "uniform" has none, the others are hybrids."""
_ANY_DEPTH = ("first", "last", "bilateral")


def standard_layers(depth: int, layout: str | Iterable[int]) -> list[int]:
    """The layers, counted from 1, that keep standard attention.

    Args:
        depth: Number of layers.
        layout: One of `LAYOUTS`, or the layers themselves.

    Raises:
        ValueError: the layout is unknown, does not fit the depth, or names layers outside of it.
    """
    if isinstance(layout, str):
        if layout not in LAYOUTS:
            raise ValueError(f"layout={layout!r}; use one of {list(LAYOUTS)} or a list of layers counted from 1")
        divisor, choose = LAYOUTS[layout]
        if depth < divisor or (layout not in _ANY_DEPTH and depth % divisor):
            raise ValueError(f"layout={layout!r} needs a depth that is a multiple of {divisor}, got {depth} layers")
        return sorted(set(choose(depth)))
    layers = sorted(set(layout))
    if any(not 1 <= i <= depth for i in layers):
        raise ValueError(f"layout={layers} names layers outside of 1 to {depth}")
    return layers
