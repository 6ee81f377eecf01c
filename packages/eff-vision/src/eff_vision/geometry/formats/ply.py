"""Point clouds as PLY, binary and little endian."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_POINT = [("x", "<f4"), ("y", "<f4"), ("z", "<f4")]
_COLOUR = [("red", "u1"), ("green", "u1"), ("blue", "u1")]
_KINDS = {"float": "<f4", "float32": "<f4", "double": "<f8", "uchar": "u1", "uint8": "u1", "int": "<i4", "uint": "<u4",
          "short": "<i2", "ushort": "<u2", "char": "i1"}  # fmt: skip


def write_ply(path: Path, points: Tensor, colours: Tensor | None = None) -> None:
    """Write points [N, 3], with colours from 0 to 1 [N, 3].

    Raises:
        ValueError: shapes are wrong, or a point is not finite.
    """
    check_cloud(points, colours)
    fields = _POINT + (_COLOUR if colours is not None else [])
    rows = np.empty(len(points), dtype=fields)
    for i, name in enumerate("xyz"):
        rows[name] = points[:, i].detach().cpu().float().numpy()
    if colours is not None:
        shades = (colours.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        for i, (name, _) in enumerate(_COLOUR):
            rows[name] = shades[:, i]
    lines = [f"property {'uchar' if kind == 'u1' else 'float'} {name}" for name, kind in fields]
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}", *lines, "end_header", ""]
    path.write_bytes("\n".join(head).encode() + rows.tobytes())


def read_ply(path: Path) -> tuple[Tensor, Tensor | None]:
    """Points [N, 3] and colours from 0 to 1 [N, 3] of a binary little-endian file, other properties left out.

    Raises:
        ValueError: it is no such file, or is cut short.
    """
    data = path.read_bytes()
    end = data.find(b"end_header")
    if not data.startswith(b"ply") or end < 0:
        raise ValueError(f"{path} is not a PLY file")
    head, body = data[:end].decode("ascii", "replace").splitlines(), data[data.index(b"\n", end) + 1 :]
    if "format binary_little_endian 1.0" not in head:
        raise ValueError(f"{path} is not binary and little endian")
    elements = [line.split() for line in head if line.startswith(("element", "property"))]
    if not elements or elements[0][:2] != ["element", "vertex"]:
        raise ValueError(f"{path} does not begin with vertices")
    fields: list[tuple[str, str]] = []
    for row in elements[1:]:
        if row[0] == "element":
            break
        if len(row) != 3 or row[1] not in _KINDS:
            raise ValueError(f"{path} has the property {' '.join(row)!r}, which cannot be read")
        fields.append((row[2], _KINDS[row[1]]))
    count, kind = int(elements[0][2]), np.dtype(fields)
    if len(body) < count * kind.itemsize:
        raise ValueError(f"{path} has {len(body)} bytes of points; {count * kind.itemsize} were wanted")
    rows = np.frombuffer(body, kind, count)
    if missing := {"x", "y", "z"} - {name for name, _ in fields}:
        raise ValueError(f"{path} has no property {sorted(missing)}")
    points = torch.from_numpy(np.stack([rows[n] for n in "xyz"], -1).astype(np.float32))
    if not {n for n, _ in _COLOUR} <= {n for n, _ in fields}:
        return points, None
    shades = np.stack([rows[n] for n, _ in _COLOUR], -1).astype(np.float32) / 255
    return points, torch.from_numpy(shades)


def check_cloud(points: Tensor, colours: Tensor | None) -> None:
    """Raise ValueError unless these are points [N, 3] with as many colours."""
    if points.dim() != 2 or points.size(1) != 3:
        raise ValueError(f"points must be [N, 3], got {list(points.shape)}")
    if colours is not None and colours.shape != points.shape:
        raise ValueError(f"colours must be {list(points.shape)}, got {list(colours.shape)}")
    if not bool(torch.isfinite(points).all()):
        raise ValueError("a point has coordinates that are not finite; leave such points out")
