"""Weights in groups of 32 columns, in the order in which group_linear reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32
_OUTPUTS = 16  # rows of the weight that lie together


@dataclass(frozen=True, slots=True, eq=False)
class GroupWeight:
    """A weight [n, k] = scale * (codes - offset) + minimum, scale and minimum one for each row and 32 columns.

    Attributes:
        packed: uint8 [n / 16 rounded up, k / 32, bytes]: of each sixteen rows and 32 columns the codes, then sixteen
            scales, then, where there are any, sixteen minima. Codes of 8 bits lie as [8, 16, 4]: four columns of each
            row, then the next four; of those of 4 bits, the low halves are the first sixteen columns.
        n: Rows.
        bits: 4 or 8.
        offset: What is taken off every code.
        minima: Whether there are minima.
        wide: Whether scales and minima are float32; float16 otherwise.
    """

    packed: Tensor
    n: int
    bits: int
    offset: int
    minima: bool
    wide: bool

    @classmethod
    def pack(
        cls, codes: Tensor, scale: Tensor, minimum: Tensor | None = None, *, bits: int, offset: int = 0
    ) -> GroupWeight:
        """From codes, whatever made them.

        Args:
            codes: Unsigned, uint8 [n, k]; k a multiple of 32.
            scale: Float [n, k / 32].
            minimum: Float [n, k / 32]; None is zero.
            bits: 4 or 8, of a code.
            offset: What is taken off every code: 8 and 128 make them signed.

        Raises:
            ValueError: shapes do not fit, or codes are larger than ``bits`` allow.
        """
        if bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {bits}")
        if codes.dim() != 2 or codes.dtype != torch.uint8 or codes.size(1) % GROUP:
            raise ValueError(f"codes must be uint8 [n, k], k a multiple of 32; got {codes.dtype} {list(codes.shape)}")
        n, groups = codes.size(0), codes.size(1) // GROUP
        for name, factor in (("scale", scale), ("minimum", minimum)):
            if factor is not None and factor.shape != (n, groups):
                raise ValueError(f"{name} must have shape {[n, groups]}, got {list(factor.shape)}")
        if bits == 4 and codes.numel() and int(codes.max()) > 15:
            raise ValueError(f"codes of 4 bits must be 15 or less, got {int(codes.max())}")
        factors = [f.float() for f in (scale, minimum) if f is not None]
        wide = not all(torch.equal(f.half().float(), f) for f in factors)
        rows = -(-n // _OUTPUTS)
        whole = codes.new_zeros(rows * _OUTPUTS, groups, GROUP)
        whole[:n] = codes.view(n, groups, GROUP)
        # [blocks, 16 rows, groups, 8 quads, 4] -> [blocks, groups, 8 quads, 16 rows, 4]
        quads = whole.view(rows, _OUTPUTS, groups, 8, 4).permute(0, 2, 3, 1, 4).reshape(rows, groups, 8, -1)
        parts = [(quads[:, :, :4] | quads[:, :, 4:] << 4 if bits == 4 else quads).flatten(2)]
        for factor in factors:
            padded = factor.new_zeros(rows * _OUTPUTS, groups)
            padded[:n] = factor
            stored = (padded if wide else padded.half()).view(rows, _OUTPUTS, groups).transpose(1, 2).contiguous()
            parts.append(stored.view(torch.uint8))
        return cls(torch.cat(parts, 2), n, bits, offset, minimum is not None, wide)

    @property
    def k(self) -> int:
        """Columns."""
        return self.packed.size(1) * GROUP

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and minima."""
        return self.packed.nbytes

    def unpack(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales and minima as `pack` takes them, factors in float32."""
        return unpack(self.packed, self.n, self.bits, self.minima, self.wide)

    def rows(self, index: Tensor) -> Tensor:
        """Some rows as float32 [..., k]: what an embedding looks up."""
        at = index.flatten()
        lane = at % _OUTPUTS
        codes, scale, minimum = _parts(self.packed[at // _OUTPUTS], self.bits, self.minima, self.wide)
        own = torch.arange(at.numel())
        values = (codes[own, :, :, lane].flatten(2).float() - self.offset) * scale[own, :, lane, None]
        if minimum is not None:
            values = values + minimum[own, :, lane, None]
        return values.reshape(*index.shape, self.k)

    def dequantize(self) -> Tensor:
        """The whole weight, float32 [n, k]."""
        codes, scale, minimum = self.unpack()
        values = (codes.unflatten(1, (-1, GROUP)).float() - self.offset) * scale[..., None]
        return (values if minimum is None else values + minimum[..., None]).flatten(1)

    @staticmethod
    def stack(weights: list[GroupWeight]) -> GroupWeight | None:
        """One weight with the rows of all; None where they differ in layout or do not end on sixteen rows."""
        first = weights[0]
        kind = (first.bits, first.offset, first.minima, first.wide, first.k)
        if any((w.bits, w.offset, w.minima, w.wide, w.k) != kind or w.n % _OUTPUTS for w in weights):
            return None
        packed = torch.cat([w.packed for w in weights])
        return GroupWeight(packed, sum(w.n for w in weights), first.bits, first.offset, first.minima, first.wide)


def unpack(packed: Tensor, n: int, bits: int, minima: bool, wide: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes uint8 [n, k], scales and minima float32 [n, k / 32] of a packed weight."""
    codes, scale, minimum = _parts(packed, bits, minima, wide)
    blocks, groups = packed.shape[:2]
    flat = codes.permute(0, 3, 1, 2, 4).reshape(blocks * _OUTPUTS, groups * GROUP)[:n]
    factors = [None if f is None else f.transpose(1, 2).reshape(-1, groups)[:n] for f in (scale, minimum)]
    assert factors[0] is not None
    return flat, factors[0], factors[1]


def _parts(packed: Tensor, bits: int, minima: bool, wide: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [blocks, groups, 8, 16, 4], scales and minima [blocks, groups, 16] of any blocks."""
    size, width = _OUTPUTS * GROUP * bits // 8, _OUTPUTS * (4 if wide else 2)
    codes = packed[:, :, :size]
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], 2)
    dtype = torch.float32 if wide else torch.float16
    factors = [packed[:, :, size + i * width : size + (i + 1) * width].contiguous() for i in range(2 if minima else 1)]
    scale, *rest = (f.view(dtype).float() for f in factors)
    return codes.unflatten(2, (8, _OUTPUTS, 4)), scale, rest[0] if rest else None
