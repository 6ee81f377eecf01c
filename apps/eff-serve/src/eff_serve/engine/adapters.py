"""Many LoRA adapters over one decoder, loaded and taken away while it runs; each sequence has its own or none."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from eff_kernels import grouped_lora
from torch import Tensor

from eff_serve.engine.adapter_files import Factors, is_mixture, read_lora, read_mixture
from eff_serve.engine.mixtures import Routed, routed_layers
from eff_serve.pictures.prompt import FUSED, fuse

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter or mixture that was loaded. A request holds it, so that it lives until its last request has ended.

    Attributes:
        name: What requests call it.
        number: Another one for each load, also of the same name.
        mixture: The routed projections of each layer; None for a single adapter.
    """

    name: str
    number: int
    mixture: tuple[dict[str, Routed], ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Stacked:
    """One projection of all adapters: a [E, rank, in] and b [E, out, rank], padded with zeros to the largest rank."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """The single adapters at one moment; never changed, so that a step of the model sees the same from start to end.

    Attributes:
        slots: Where each adapter stands in the stacks, by its number.
        layers: Of each layer the stacks by the names of fused projections.
    """

    slots: Mapping[int, int]
    layers: tuple[Mapping[str, Stacked], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Which adapter each row of one step has.

    Attributes:
        tables: Of the single adapters.
        slots: int64 [T, 1], -1 where a row has none; None if no row has one.
        mixtures: Mixtures with the rows that they act on; None is all rows.
    """

    tables: Tables
    slots: Tensor | None
    mixtures: tuple[tuple[tuple[dict[str, Routed], ...], Tensor | None], ...]

    def add(self, layer: int, projection: str, x: Tensor, y: Tensor) -> Tensor:
        """Y with each row's adapter added; a row without one keeps its bits."""
        if self.slots is not None and (found := self.tables.layers[layer].get(projection)) is not None:
            y = grouped_lora(x, found.a, found.b, self.slots, y=y)
        for layers, rows in self.mixtures:
            routed = layers[layer].get(projection)
            if routed is not None:
                y = routed.add(x, y) if rows is None else y.index_copy(0, rows, routed.add(x[rows], y[rows]))
        return y


class Adapters:
    """Adapters by name, for the decoder's fused projections. `load` and `unload` may be called from any thread.

    Args:
        folders: Folders that PEFT or `eff_adapters.lora_mixer` wrote, by the names that requests use.
        shapes: For each single projection, such as "q_proj", its outputs and inputs.
        num_layers: Layers of the decoder.

    Raises:
        ValueError, FileNotFoundError: as `load`.
    """

    def __init__(self, folders: Mapping[str, Path], shapes: Mapping[str, tuple[int, int]], num_layers: int) -> None:
        self._shapes, self._num_layers = shapes, num_layers
        self._lock = threading.Lock()
        self._by_name: dict[str, Adapter] = {}
        self._alive: weakref.WeakValueDictionary[int, Adapter] = weakref.WeakValueDictionary()
        self._count = 0
        self._tables = Tables({}, tuple({} for _ in range(num_layers)))
        for name, folder in folders.items():
            self.load(name, folder)

    @property
    def names(self) -> tuple[str, ...]:
        """Names that requests may use now."""
        return tuple(self._by_name)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        stacks = sum(s.a.nbytes + s.b.nbytes for layer in self._tables.layers for s in layer.values())
        mixtures = [a.mixture for a in list(self._alive.values()) if a.mixture is not None]
        return stacks + sum(r.nbytes for layers in mixtures for layer in layers for r in layer.values())

    def get(self, name: str) -> Adapter:
        """The adapter of a name.

        Raises:
            ValueError: there is none.
        """
        found = self._by_name.get(name)
        if found is None:
            raise ValueError(f"there is no adapter {name!r}; there are {list(self.names)}")
        return found

    def load(self, name: str, folder: Path, *, replace: bool = False) -> None:
        """Read a folder and offer it under a name; with an error nothing has changed.

        Args:
            name: Letters, digits, ".", "_" and "-".
            folder: Of PEFT, or of a mixture.
            replace: Put it in the place of one of that name; requests that have that one keep it.

        Raises:
            ValueError: the name is odd or taken, the adapter is no plain LoRA, or fits another model.
            FileNotFoundError: the folder is none of PEFT's, or a part of it is missing.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"adapter name {name[:60]!r}; use letters, digits, '.', '_' and '-'")
        if name in self._by_name and not replace:
            raise ValueError(f"there is an adapter {name!r} already")
        mixture, factors = None, None
        if is_mixture(folder):
            mixture = routed_layers(
                read_mixture(name, folder, self._shapes, self._num_layers), self._shapes, self._num_layers
            )
        else:
            factors = read_lora(name, folder, self._shapes, self._num_layers)
        with self._lock:
            if name in self._by_name and not replace:
                raise ValueError(f"there is an adapter {name!r} already")
            adapter = Adapter(name, self._count, mixture)
            tables = self._rebuilt(None if factors is None else (adapter.number, factors))
            self._count += 1
            self._tables = tables
            self._alive[adapter.number] = adapter
            self._by_name.pop(name, None)  # what is new comes last, also under an old name
            self._by_name[name] = adapter
            self._tables = self._rebuilt(None)  # without one whose place it took

    def unload(self, name: str) -> None:
        """Take a name away. Requests that have the adapter keep it; its memory is free when it is used no more.

        Raises:
            ValueError: there is no such adapter.
        """
        with self._lock:
            self.get(name)
            del self._by_name[name]
            self._tables = self._rebuilt(None)

    def rows(self, numbers: Tensor) -> Rows:
        """What a step needs to know of the adapters of its rows.

        Args:
            numbers: int64 [T], numbers of adapters; -1 is none.

        Raises:
            ValueError: a number of no adapter that is held.
        """
        tables, given = self._tables, numbers.tolist()
        slots, routed = [-1] * len(given), dict[int, list[int]]()
        for row, number in enumerate(given):
            if number in tables.slots:
                slots[row] = tables.slots[number]
            elif number >= 0:
                routed.setdefault(number, []).append(row)
        mixtures = []
        for number, rows in routed.items():
            adapter = self._alive.get(number)
            if adapter is None or adapter.mixture is None:
                raise ValueError(f"there is no adapter of number {number}")
            mixtures.append((adapter.mixture, None if len(rows) == len(given) else torch.tensor(rows)))
        plain = torch.tensor(slots)[:, None] if max(slots, default=-1) >= 0 else None
        return Rows(tables, plain, tuple(mixtures))

    def _rebuilt(self, new: tuple[int, Factors] | None) -> Tables:
        """Tables of the adapters that are still in use, and a new one."""
        kept = [number for number in self._tables.slots if number in self._alive]
        if new is None and len(kept) == len(self._tables.slots):
            return self._tables
        sizes = {part: out for part, (out, _) in self._shapes.items()}
        layers: list[dict[str, Stacked]] = []
        for i in range(self._num_layers):
            here = {}
            for fused, parts in FUSED.items():
                old = self._tables.layers[i].get(fused)
                pairs = [_slot(old, self._tables.slots[n]) for n in kept]
                if new is not None:
                    found = {p: new[1][i, p] for p in parts if (i, p) in new[1]}
                    pairs.append(fuse(found, parts, sizes) if found else None)
                if any(pair is not None for pair in pairs):
                    outs = sum(sizes[part] for part in parts)
                    here[fused] = _stacked(pairs, outs, self._shapes[parts[0]][1])
            layers.append(here)
        numbers = kept if new is None else [*kept, new[0]]
        return Tables({number: slot for slot, number in enumerate(numbers)}, tuple(layers))


def _slot(old: Stacked | None, slot: int) -> Pair | None:
    """One adapter's pair, without the rank that only others need; None where it has nothing."""
    if old is None:
        return None
    used = old.a[slot].any(1) | old.b[slot].any(0)
    rank = int(used.nonzero()[-1]) + 1 if used.any() else 0
    return (old.a[slot, :rank], old.b[slot, :, :rank]) if rank else None


def _stacked(pairs: list[Pair | None], outs: int, inputs: int) -> Stacked:
    rank = max(pair[0].size(0) for pair in pairs if pair is not None)
    a, b = torch.zeros(len(pairs), rank, inputs), torch.zeros(len(pairs), outs, rank)
    for i, pair in enumerate(pairs):
        if pair is not None:
            a[i, : pair[0].size(0)], b[i, :, : pair[1].size(1)] = pair
    return Stacked(a, b)
