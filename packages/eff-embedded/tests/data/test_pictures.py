"""Photographs, stereo, posed photographs, digits and the hyperspectral cube: known facts about each."""

import numpy as np
import pytest
import torch
from eff_embedded.data import (
    INDIAN_PINES_CLASSES,
    PHOTOGRAPHS,
    balbianello,
    digits,
    indian_pines,
    motorcycle_stereo,
    photograph,
)
from eff_embedded.scenes import project_points


def test_photographs():
    for name in PHOTOGRAPHS:
        picture = photograph(name)
        assert picture.mode == "RGB"
        assert min(picture.size) >= 300, name
    assert photograph("astronaut").size == (512, 512)
    with pytest.raises(ValueError, match="no photograph 'lena'; there are astronaut"):
        photograph("lena")


def test_stereo_disparity_carries_the_left_view_onto_the_right():
    pair = motorcycle_stereo()
    assert pair.left.shape == pair.right.shape == (3, 500, 741)
    assert pair.disparity.shape == pair.valid.shape == (500, 741)
    assert 0.8 < pair.valid.float().mean() < 1

    def error(disparity):
        """Mean difference of the left view and the right one looked at where the disparity says."""
        at = (torch.arange(741) - disparity).round().long()
        inside = pair.valid & (at >= 0) & (at < 741)
        rows = torch.arange(500)[:, None].expand(500, 741)
        return float((pair.right[:, rows[inside], at[inside]] - pair.left[:, inside]).abs().mean())

    right = error(pair.disparity)
    assert right < 0.04
    assert error(pair.disparity + 4) > 1.5 * right
    assert error(-pair.disparity) > 3 * right
    depth = pair.depth()[pair.valid]
    assert 2 < depth.min() < depth.median() < depth.max() < 6  # a workshop
    assert pair.depth()[~pair.valid].isinf().all()
    torch.testing.assert_close(
        depth * (pair.disparity[pair.valid] + pair.offset), torch.full_like(depth, 192.03), rtol=1e-3, atol=0
    )


def test_posed_photographs_reproject(needs):
    needs("gtsam")
    found = balbianello()
    assert found.images.shape == (5, 3, 427, 640)
    assert found.points.shape == (544, 3)
    assert len(found.pixels) == len(found.views) == len(found.tracks) == 1417
    errors = []
    for view in range(5):
        mine = found.views == view
        seen, z = found.project(view, found.points[found.tracks[mine]])
        assert (z > 0).all()  # in front of an OpenCV camera
        errors.append((seen - found.pixels[mine]).norm(dim=1))
        pose = found.extrinsics[view, :3, :3]
        torch.testing.assert_close(pose @ pose.T, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
        assert torch.linalg.det(pose) == pytest.approx(1)
        # Near the middle the lens does not bend: the common pinhole projection agrees.
        plain, _ = project_points(found.points[found.tracks[mine]].T, found.intrinsics[view], found.extrinsics[view])
        middle = (found.pixels[mine] - torch.tensor([320.0, 213.5])).norm(dim=1) < 60
        assert (plain.T - seen)[middle].norm(dim=1).max() < 0.5
    every = torch.cat(errors)
    assert every.median() == pytest.approx(0.1285, abs=1e-3)
    assert every.quantile(0.9) < 1
    # The colour of a point is that of the picture where it was seen.
    u, v = found.pixels.floor().long().T
    shown = found.images[found.views, :, v, u]
    assert (shown - found.colours[found.tracks]).abs().mean() < 0.12
    shuffled = found.colours[found.tracks.roll(400)]
    assert (shown - shuffled).abs().mean() > 0.15


def test_digits():
    found = digits()
    assert found.images.shape == (1797, 1, 8, 8)
    assert found.images.min() == 0
    assert found.images.max() == 1
    assert found.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    from sklearn.datasets import load_digits

    known = load_digits()
    assert np.array_equal(found.images[:, 0].numpy() * 16, known.images)
    assert np.array_equal(found.labels.numpy(), known.target)


def test_indian_pines():
    scene = indian_pines()
    assert scene.cube.shape == (200, 145, 145)
    assert scene.labels.shape == (145, 145)
    sizes = [10776, 46, 1428, 830, 237, 483, 730, 28, 478, 20, 972, 2455, 593, 205, 1265, 386, 93]
    assert scene.labels.flatten().bincount().tolist() == sizes
    assert len(INDIAN_PINES_CLASSES) == 16
    assert scene.classes[10 - 1] == "Soybean-notill"
    assert scene.cube.min() == 955
    assert scene.cube.max() == 9604
    assert len(scene.bands) == 200
    assert scene.bands.tolist() == sorted(set(scene.bands.tolist()))
    assert 104 not in scene.bands
    assert scene.bands[-1] == 219
    # Bands run through the spectrum: neighbours are alike, and plants reflect infrared more than red light.
    flat = scene.cube.flatten(1)
    neighbours = torch.stack([torch.corrcoef(flat[[k, k + 1]])[0, 1] for k in range(10, 100, 10)])
    assert neighbours.median() > 0.95
    grass = scene.cube[:, scene.labels == 6].mean(1)
    assert grass[40] > 1.3 * grass[28]


def test_classes_of_indian_pines_differ_in_their_spectra():
    """Nearest mean of fifteen principal components, with blocks for training and testing laid out like a chessboard."""
    scene = indian_pines()
    block = torch.arange(145) // 29
    training = (block[:, None] + block) % 2 == 0
    spectra = scene.cube.double().flatten(1)
    spectra = spectra - spectra.mean(1, keepdim=True)
    values, axes = torch.linalg.eigh(spectra @ spectra.T)
    parts = ((axes / values.sqrt()).T[-15:] @ spectra).view(15, 145, 145)
    train, test = scene.labels * training, scene.labels * ~training
    known = torch.tensor([c for c in range(1, 17) if (train == c).any()])
    means = torch.stack([parts[:, train == c].mean(1) for c in known])
    guess = known[torch.cdist(parts[:, test > 0].T, means).argmin(1)]
    largest = test[test > 0].bincount().max() / (test > 0).sum()
    assert (guess == test[test > 0]).float().mean() > 1.3 * largest  # 0.40 against 0.24
