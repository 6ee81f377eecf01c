"""Finds, boxes and relations without a trained network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from eff_embedded.diffusion import example
from eff_embedded.judge import Find, JudgeNetwork, Reading, box_of, tensor_of


def test_place_follows_the_rule_of_collages() -> None:
    """Readings with the true boxes tell exactly the relations of place that the collage holds."""
    told = 0
    for seed in range(90):
        collage = example(seed, grid=seed % 2 == 0).collage
        if len(collage.names) != 2:
            continue
        finds = tuple(
            Find(name, 1.0, tuple(float(v) for v in box))  # type: ignore[arg-type]
            for name, box in zip(collage.names, collage.boxes, strict=True)
        )
        reading = Reading(finds=finds, size=128)
        kinds = ("left of", "right of", "above", "below")
        wanted = {(r.subject, r.object): r.kind for r in collage.relations if r.kind in kinds}
        for i, j in ((0, 1), (1, 0)):
            assert reading.place(collage.names[i], collage.names[j]) == wanted.get((i, j))
        told += len(wanted)
    assert told > 40


def test_holds_allows_for_the_error_of_boxes() -> None:
    """Worked cases: plain, too near, about diagonal, the wrong way round."""

    def holds(x: float, y: float, kind: str) -> bool:
        finds = (Find("dog", 0.9, (50, 50, 70, 70)), Find("cat", 0.9, (50 + x, 50 + y, 70 + x, 70 + y)))
        return Reading(finds=finds, size=128).holds("dog", kind, "cat")  # type: ignore[arg-type]

    assert holds(40, 0, "left of")
    assert not holds(40, 0, "right of")
    assert not holds(40, 0, "above")
    assert not holds(15, 0, "left of")
    assert holds(40, 44, "left of")
    assert holds(40, 44, "above")
    assert not holds(40, 50, "left of")
    assert holds(-40, 0, "right of")
    assert holds(0, -30, "below")
    with pytest.raises(ValueError, match="behind"):
        holds(40, 0, "behind")
    assert not Reading(finds=(), size=128).holds("dog", "above", "cat")


def test_place_of_what_is_missing() -> None:
    """None, not an error."""
    reading = Reading(finds=(Find("dog", 0.9, (0, 0, 10, 10)),), size=128)
    assert reading.place("dog", "cat") is None
    assert reading.find("cat") is None
    assert reading.names == ("dog",)


def test_box_from_shares_of_cells() -> None:
    """A box that ends inside cells is found to a fraction of a cell."""
    for box in ((16, 24, 56, 80), (21, 30, 70, 75), (0, 0, 128, 128)):
        mask = torch.zeros(128, 128)
        mask[box[1] : box[3], box[0] : box[2]] = 1
        shares = torch.nn.functional.avg_pool2d(mask[None, None], 8)[0, 0]
        assert box_of(shares, 8) == pytest.approx(box, abs=4)


def test_pictures_in_all_forms_are_one_tensor() -> None:
    """PIL, lists, arrays and tensors agree; other kinds are refused."""
    from PIL import Image

    array = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3)).astype(np.uint8)
    made = tensor_of(array)
    assert made.shape == (2, 3, 16, 24)
    assert torch.equal(tensor_of([Image.fromarray(a) for a in array]), made)
    assert torch.equal(tensor_of(Image.fromarray(array[0])), made[:1])
    assert torch.equal(tensor_of(made), made)
    with pytest.raises(TypeError, match="int64"):
        tensor_of(array.astype(np.int64))
    with pytest.raises(TypeError, match="uint8"):
        tensor_of(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="multiples of 8"):
        tensor_of(torch.zeros(1, 3, 15, 16))


def test_network_shapes_and_gradient() -> None:
    """Logits of cells and of presence; a picture's gradient exists, as guidance by the judge needs."""
    network = JudgeNetwork(5, width=32, depth=2)
    pictures = torch.rand(2, 3, 32, 64, requires_grad=True)
    cells, presence = network(pictures)
    assert cells.shape == (2, 6, 4, 8)
    assert presence.shape == (2, 5)
    presence.sum().backward()
    assert pictures.grad is not None
    assert bool(pictures.grad.abs().sum() > 0)
