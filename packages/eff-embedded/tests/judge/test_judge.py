"""The trained judge on collages whose content is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from eff_embedded.diffusion import example
from eff_embedded.judge import Judge, load_judge

COLLAGES = [example(10**8 + i).collage for i in range(64)]


@pytest.fixture(scope="module")
def judge() -> Judge:
    """The judge, loaded once."""
    return load_judge()


def test_it_finds_what_is_there(judge: Judge) -> None:
    """On drawn collages of its world it is right almost always, otherwise it may judge nothing."""
    readings = judge(np.stack([collage.picture for collage in COLLAGES]))
    exact = [set(r.names) == set(c.names) for r, c in zip(readings, COLLAGES, strict=True)]
    assert np.mean(exact) >= 0.9
    told = [
        r.holds(c.names[t.subject], t.kind, c.names[t.object])
        for r, c in zip(readings, COLLAGES, strict=True)
        for t in c.relations
        if t.kind in ("left of", "above")
    ]
    assert len(told) > 40
    assert np.mean(told) >= 0.93


def test_boxes_lie_where_the_objects_lie(judge: Judge) -> None:
    """Centres of finds are within a cell of the true ones, for nine in ten."""
    off = []
    for collage in COLLAGES:
        reading = judge(collage.picture)[0]
        for name, box in zip(collage.names, collage.boxes, strict=True):
            if (found := reading.find(name)) is not None:
                true = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
                off.append(np.hypot(found.centre[0] - true[0], found.centre[1] - true[1]))
    assert np.quantile(off, 0.9) < 8


def test_it_finds_nothing_where_nothing_is(judge: Judge) -> None:
    """Grounds alone, noise, and objects smeared beyond recognition."""
    grounds = torch.stack([torch.from_numpy(c.ground).permute(2, 0, 1).float() / 255 for c in COLLAGES[:16]])
    noise = torch.rand(8, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    pictures = torch.stack([c.tensor() for c in COLLAGES[:16]])
    smeared = torch.nn.functional.interpolate(
        torch.nn.functional.avg_pool2d(pictures, 32), scale_factor=32.0, mode="bilinear"
    )
    for none in (grounds, noise, smeared):
        assert sum(len(reading.names) for reading in judge(none)) <= 1


def test_batch_equals_single(judge: Judge) -> None:
    """Scores of a picture do not depend on its company."""
    pictures = torch.stack([c.tensor() for c in COLLAGES[:3]])
    with torch.no_grad():
        batch = judge.scores(pictures)
        for i in range(3):
            alone = judge.scores(pictures[i])
            torch.testing.assert_close(alone.presence[0], batch.presence[i], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(alone.cells[0], batch.cells[i], rtol=1e-4, atol=1e-4)
