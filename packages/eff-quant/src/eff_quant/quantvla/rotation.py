"""Block rotations: orthogonal matrices on blocks of columns or rows, which change nothing until something is rounded.

A linear layer y = x W^T is the same as x' = x P R, W' = S W P R, y = (x' W'^T) S for a permutation P of the inputs and
orthogonal R (inputs) and S (outputs), all block by block. All functions here leave their arguments as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["svd", "hadamard"]


@dataclass(frozen=True, slots=True)
class BlockRotation:
    """Orthogonal matrices for a dimension that is cut into blocks.

    Attributes:
        blocks: [n, B, B], or [1, B, B] for one that all n blocks share.
        tail: [r, r] for the last r < B entries, None if there are none.
    """

    blocks: Tensor
    tail: Tensor | None


def svd_rotation(weight: Tensor, block: int) -> BlockRotation:
    """Rotations of the columns of ``weight`` [N, K] that sort each block's energy: left singular vectors of W[:, j]^T.

    The columns of W[:, j] R_j are orthogonal and of falling norm. Computed in float64, returned in float32.
    """
    weight = weight.detach().double()
    whole = weight.shape[1] // block * block
    full = weight[:, :whole].unflatten(1, (-1, block)).permute(1, 2, 0)  # [n, B, N]
    blocks = _left_vectors(full) if whole else weight.new_zeros(0, block, block)
    tail = _left_vectors(weight[:, whole:].T) if whole < weight.shape[1] else None
    return BlockRotation(blocks.float(), None if tail is None else tail.float())


def _left_vectors(matrices: Tensor) -> Tensor:
    # Of A A^T, which is small, where A is wide; eigh sorts upwards.
    if matrices.shape[-1] > 2 * matrices.shape[-2]:
        return torch.linalg.eigh(matrices @ matrices.mT).eigenvectors.flip(-1)
    return torch.linalg.svd(matrices, full_matrices=True).U


def hadamard_rotation(size: int, block: int, device: torch.device | None = None) -> BlockRotation:
    """The orthonormal Hadamard matrix on each block of ``size`` entries; a tail is cut into powers of two.

    Raises:
        ValueError: ``block`` is no power of two.
    """
    if block < 1 or block & (block - 1):
        raise ValueError(f"block={block}; Hadamard matrices here need a power of two, such as 64")
    rest = size % block
    pieces = [_hadamard(1 << bit, device) for bit in reversed(range(block.bit_length())) if rest & (1 << bit)]
    blocks = _hadamard(block, device)[None] if size >= block else torch.zeros(0, block, block, device=device)
    return BlockRotation(blocks, torch.block_diag(*pieces) if pieces else None)


def _hadamard(size: int, device: torch.device | None) -> Tensor:
    h = torch.ones(1, 1, device=device)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h / size**0.5


def transposed(rotation: BlockRotation) -> BlockRotation:
    """The inverse rotation."""
    return BlockRotation(
        rotation.blocks.mT.contiguous(), None if rotation.tail is None else rotation.tail.T.contiguous()
    )


def rotate(x: Tensor, rotation: BlockRotation) -> Tensor:
    """Return x R for x [..., K], block by block, in float32 (float64 for a float64 x)."""
    blocks, tail = rotation.blocks, rotation.tail
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, blocks = x.to(wide), blocks.to(wide)
    size = blocks.shape[-1]
    rows = x.reshape(-1, x.shape[-1])
    whole = rows.shape[1] - (0 if tail is None else tail.shape[0])
    if len(blocks) == 1:
        turned = (rows[:, :whole].reshape(-1, size) @ blocks[0]).view(len(rows), whole)
    else:
        turned = torch.bmm(rows[:, :whole].unflatten(1, (whole // size, size)).transpose(0, 1), blocks)
        turned = turned.transpose(0, 1).reshape(len(rows), whole)
    if tail is not None:
        turned = torch.cat([turned, rows[:, whole:] @ tail.to(wide)], 1)
    return turned.view(x.shape)


def zigzag_permutation(energy: Tensor, block: int) -> Tensor:
    """Deal columns out to the blocks by falling energy, forwards and backwards in turn, so that each gets its share.

    Args:
        energy: Energy of each column, [K]. See `blended_energy`.
        block: Size B of a block. The last K mod B places, if any, are one block more, which drops out when it is full.

    Returns:
        int64 [K]: column ``permutation[i]`` goes to place i.
    """
    sizes = [block] * (len(energy) // block) + ([len(energy) % block] if len(energy) % block else [])
    members: list[list[int]] = [[] for _ in sizes]
    order = iter(energy.argsort(descending=True, stable=True).tolist())
    forwards = True
    left = len(energy)
    while left:
        turn = [i for i, size in enumerate(sizes) if len(members[i]) < size]
        for i in turn if forwards else reversed(turn):
            members[i].append(next(order))
        left -= len(turn)
        forwards = not forwards
    return torch.tensor([column for block_members in members for column in block_members], device=energy.device)


def blended_energy(activations: Tensor, weights: Tensor, blend: float) -> Tensor:
    """(1 - blend) * activations + blend * weights, each [K] and brought to a mean of 1.

    Blending one energy with its own mean, as the released code does, never changes an order; blending the energies of
    the two operands does.
    """
    a, w = (e.double() / e.double().mean().clamp_min(torch.finfo(torch.float64).tiny) for e in (activations, weights))
    return (1 - blend) * a + blend * w
