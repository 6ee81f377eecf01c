"""Recordings of nerves and brains from the package nitime."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eff_embedded.data.packages import package_file

_EXTRA = "eff-embedded[neural]"


class SpikeTrain(NamedTuple):
    """The answer of one nerve cell to a sound.

    Attributes:
        spikes: When it fired, in seconds, rising, [K], float64.
        stimulus: Amplitude of the sound as recorded, [N], float32.
        rate: Samples of the stimulus in a second; the first is at time 0.
    """

    spikes: Tensor
    stimulus: Tensor
    rate: float


class BrainSeries(NamedTuple):
    """Blood oxygen over time in regions of a brain.

    Attributes:
        values: [time, regions], float32, in units of the scanner.
        regions: Their short names.
    """

    values: Tensor
    regions: tuple[str, ...]


def grasshopper_neuron(cell: int = 1) -> SpikeTrain:
    """Ten seconds of an auditory receptor of a grasshopper that hears noise.

    Args:
        cell: 1 or 2.

    Raises:
        ValueError: there is no such cell.
        ImportError: nitime is not installed.
    """
    if cell not in (1, 2):
        raise ValueError(f"cell={cell}; use 1 or 2")
    spikes = np.loadtxt(package_file("nitime", "data", f"grasshopper_spike_times{cell}.txt", install=_EXTRA))
    sound = np.loadtxt(package_file("nitime", "data", f"grasshopper_stimulus{cell}.txt", install=_EXTRA))
    step = sound[1, 0] - sound[0, 0]  # microseconds, like the spikes
    return SpikeTrain(torch.from_numpy(spikes * 1e-6), torch.from_numpy(sound[:, 1]).float(), 1e6 / float(step))


def fmri_regions() -> BrainSeries:
    """A resting brain: 250 volumes of 31 regions.

    Raises:
        ImportError: nitime is not installed.
    """
    path = package_file("nitime", "data", "fmri_timeseries.csv", install=_EXTRA)
    with path.open(encoding="ascii") as file:
        names = tuple(name.strip().strip('"') for name in file.readline().split(","))
        values = np.loadtxt(file, delimiter=",", dtype=np.float32)
    return BrainSeries(torch.from_numpy(values), names)
