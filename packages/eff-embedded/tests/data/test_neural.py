"""Recordings: the cell answers its sound, regions of a brain go together."""

import pytest
import torch
from eff_embedded.data import fmri_regions, grasshopper_neuron


@pytest.mark.parametrize("cell", [1, 2])
def test_cell_fires_after_loud_sound(cell, needs):
    """Mean stimulus before a spike: its largest departure is some milliseconds earlier, and none comes after."""
    needs("nitime")
    train = grasshopper_neuron(cell)
    assert train.rate == 20000
    assert train.stimulus.shape == (200000,)
    assert (train.spikes.diff() > 0).all()
    assert 0 < train.spikes[0] < train.spikes[-1] < 10
    at = (train.spikes * train.rate).round().long()
    at = at[(at > 600) & (at < 199400)]
    mean = torch.stack([train.stimulus[at + lag].mean() for lag in range(-600, 600, 10)]) - train.stimulus.mean()
    peak = int(mean.abs().argmax())
    assert 0.002 < -(-600 + 10 * peak) / train.rate < 0.02
    assert mean[:60].abs().max() > 3 * mean[70:].abs().max()


def test_no_third_cell():
    with pytest.raises(ValueError, match="cell=3; use 1 or 2"):
        grasshopper_neuron(3)


def test_both_sides_of_the_brain_go_together(needs):
    needs("nitime")
    series = fmri_regions()
    assert series.values.shape == (250, 31)
    assert series.regions[:4] == ("WM", "Vent", "Brain", "LCau")
    like = torch.corrcoef(series.values.T)
    pairs = [
        (i, series.regions.index("R" + n[1:]))
        for i, n in enumerate(series.regions)
        if n[0] == "L" and "R" + n[1:] in series.regions
    ]
    assert len(pairs) >= 10
    same = torch.stack([like[i, j] for i, j in pairs]).mean()
    other = torch.stack([like[i, k] for i, j in pairs for _, k in pairs if k != j]).mean()
    assert same > other + 0.15
