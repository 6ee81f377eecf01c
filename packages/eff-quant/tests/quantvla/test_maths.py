"""Rotations, permutation and rounding by themselves."""

import pytest
import torch
from eff_quant.quantvla import W4A8Config
from eff_quant.quantvla.layer import input_rotation, rotated_weight
from eff_quant.quantvla.rotation import (
    blended_energy,
    hadamard_rotation,
    rotate,
    svd_rotation,
    transposed,
    zigzag_permutation,
)
from eff_quant.quantvla.rounding import CANDIDATES, round_rows
from hypothesis import given
from hypothesis import strategies as st

SHAPES = [(128, 128), (96, 100), (64, 33), (7, 190), (200, 64), (3, 5)]


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("kind", ["svd", "hadamard"])
@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("rows", [False, True])
def test_rotations_change_nothing_until_something_is_rounded(n, k, kind, permute, rows):
    torch.manual_seed(0)
    weight, x = torch.randn(n, k), torch.randn(9, k)
    config = W4A8Config(rotation=kind, permute=permute)
    rotation, permutation = input_rotation(weight, config)
    turned = rotate(x if permutation is None else x[:, permutation], rotation)
    matrix = rotated_weight(weight, rotation, permutation)
    if rows:
        out = svd_rotation(matrix.T, config.block)  # W'' = S W', S = U^T
        propagated = turned @ rotate(matrix.T, out)
        y = rotate(propagated, transposed(out))
        torch.testing.assert_close(y, turned @ matrix.T, rtol=1e-4, atol=1e-4)
    else:
        y = turned @ matrix.T
    wanted = x.double() @ weight.double().T
    assert float((y - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("size", [64, 128, 100, 33, 190, 5])
@pytest.mark.parametrize("kind", ["svd", "hadamard"])
def test_they_are_orthogonal(size, kind):
    rotation = hadamard_rotation(size, 64) if kind == "hadamard" else svd_rotation(torch.randn(20, size), 64)
    for matrices in (rotation.blocks, rotation.tail):
        if matrices is not None and matrices.numel():
            eye = torch.eye(matrices.shape[-1])
            torch.testing.assert_close(matrices.mT @ matrices, eye.expand_as(matrices), rtol=0, atol=1e-5)
    x = torch.randn(3, size)
    torch.testing.assert_close(rotate(rotate(x, rotation), transposed(rotation)), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [10, 64, 300])
def test_the_svd_sorts_the_energy_of_each_block(n):
    weight = torch.randn(n, 150)
    energy = rotate(weight, svd_rotation(weight, 64)).double().square().sum(0)
    for block in (energy[:64], energy[64:128], energy[128:]):
        assert (block[1:] <= block[:-1] + 1e-4).all()
    matrix = weight[:, :64].double()
    torch.testing.assert_close(energy[:64].sum(), matrix.square().sum(), rtol=1e-5, atol=0)
    largest = torch.linalg.matrix_norm(matrix, 2) ** 2
    torch.testing.assert_close(energy[0], largest, rtol=1e-5, atol=0)


def test_hadamard_needs_a_power_of_two():
    with pytest.raises(ValueError, match="block=48"):
        hadamard_rotation(96, 48)


def test_rotating_leaves_the_weight_as_it_was():
    weight = torch.randn(64, 96)
    before = weight.clone()
    rotation, _ = input_rotation(weight, W4A8Config())
    first = rotated_weight(weight, rotation, None)
    assert torch.equal(weight, before)
    assert torch.equal(rotated_weight(weight, rotation, None), first)


def test_zigzag_by_hand():
    energy = torch.tensor([1.0, 8, 2, 7, 3, 6, 4, 5])
    # falling: 8 (1), 7 (3) | 6 (5), 5 (7) backwards | 4 (6), 3 (4) | 2 (2), 1 (0) backwards
    assert zigzag_permutation(energy, 4).tolist() == [1, 7, 6, 0, 3, 5, 4, 2]


@given(st.integers(1, 200), st.sampled_from([2, 16, 64]))
def test_zigzag_is_a_permutation_that_evens_out_blocks(k, block):
    energy = torch.rand(k, generator=torch.Generator().manual_seed(k)) ** 4
    permutation = zigzag_permutation(energy, block)
    assert sorted(permutation.tolist()) == list(range(k))
    whole = k // block * block
    if k % block == 0 and k > block:
        sums = energy[permutation][:whole].view(-1, block).sum(1)
        # Two neighbouring deals differ by at most the largest entry.
        assert sums.max() - sums.min() <= energy.max() + 1e-5


def test_the_blend_of_energies_has_an_effect():
    torch.manual_seed(0)
    activations, weights = torch.rand(128) + 0.1, torch.rand(128) + 0.1
    orders = [zigzag_permutation(blended_energy(activations, weights, b), 64).tolist() for b in (0.0, 0.15, 1.0)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] == zigzag_permutation(activations, 64).tolist()
    assert orders[2] == zigzag_permutation(weights, 64).tolist()


@pytest.mark.parametrize("bits", [4, 8])
def test_each_row_gets_the_candidate_with_the_least_error(bits):
    torch.manual_seed(0)
    weight = torch.randn(50, 96) * torch.logspace(-3, 3, 50)[:, None]
    weight[0] = 0
    codes, scale = round_rows(weight, bits)
    top = 2 ** (bits - 1) - 1
    assert codes.min() >= -top - 1
    assert codes.max() <= top
    assert codes.dtype == torch.int8
    errors = []
    for a in CANDIDATES:
        s = weight.double().abs().amax(1, keepdim=True) / top / a
        rounded = (weight / s.clamp_min(1e-300)).round().clamp(-top - 1, top) * s
        errors.append((rounded - weight).square().sum(1))
    least = torch.stack(errors).amin(0)
    found = (codes * scale.double()[:, None] - weight).square().sum(1)
    torch.testing.assert_close(found, least, rtol=1e-4, atol=0)
    used = (weight.abs().amax(1) / top / scale)[1:]
    assert len(used.round(decimals=2).unique()) > 1 or bits == 8  # the choice matters
    assert scale[0] == 0


def test_infinite_weights_are_refused_with_their_row():
    weight = torch.randn(5, 8)
    weight[3, 2] = float("nan")
    with pytest.raises(ValueError, match="weight row 3 holds inf or NaN"):
        round_rows(weight, 4)


def test_rounding_rows_of_nothing():
    codes, scale = round_rows(torch.zeros(3, 0), 4)
    assert codes.shape == (3, 0)
    assert scale.tolist() == [0, 0, 0]
