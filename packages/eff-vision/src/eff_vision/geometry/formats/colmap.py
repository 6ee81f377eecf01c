"""COLMAP's text model: cameras.txt, images.txt, points3D.txt, each view with a PINHOLE camera of its own.

COLMAP's frames are ours: x right, y down, z forward, world to camera, the first pixel's centre at (0.5, 0.5). Its
quaternions are (w, x, y, z).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from eff_vision.geometry.formats.posed import PosedViews
from eff_vision.geometry.poses import matrix_to_quaternion, quaternion_to_matrix


def write_colmap(folder: Path, views: PosedViews, points: Tensor | None = None, colours: Tensor | None = None) -> None:
    """Write a model.

    Args:
        folder: Made if it does not exist.
        views: The cameras.
        points: Of the world, [N, 3], or None.
        colours: From 0 to 1, [N, 3]; white if None.
    """
    views = views.checked()
    folder.mkdir(parents=True, exist_ok=True)
    height, width = views.size
    quaternions = matrix_to_quaternion(views.extrinsics[:, :, :3])
    cameras, images = [], []
    for i, name in enumerate(views.names, 1):
        k, (x, y, z, w) = views.intrinsics[i - 1], quaternions[i - 1].tolist()
        lens = f"{k[0, 0].item()!r} {k[1, 1].item()!r} {k[0, 2].item()!r} {k[1, 2].item()!r}"
        shift = " ".join(repr(v) for v in views.extrinsics[i - 1, :, 3].tolist())
        cameras.append(f"{i} PINHOLE {width} {height} {lens}\n")
        images.append(f"{i} {w!r} {x!r} {y!r} {z!r} {shift} {i} {name}\n\n")
    (folder / "cameras.txt").write_text("# CAMERA_ID MODEL WIDTH HEIGHT PARAMS[]\n" + "".join(cameras))
    (folder / "images.txt").write_text("# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME\n" + "".join(images))
    lines = []
    if points is not None:
        shades = torch.ones_like(points) if colours is None else colours
        bytes_ = (shades.clamp(0, 1) * 255).round().long().tolist()
        lines = [
            f"{i} {x!r} {y!r} {z!r} {r} {g} {b} 0\n"
            for i, ((x, y, z), (r, g, b)) in enumerate(zip(points.double().tolist(), bytes_, strict=True), 1)
        ]
    (folder / "points3D.txt").write_text("# POINT3D_ID X Y Z R G B ERROR TRACK[]\n" + "".join(lines))


def read_colmap(folder: Path) -> PosedViews:
    """Read cameras of the models PINHOLE and SIMPLE_PINHOLE, in the order of their names.

    Raises:
        ValueError: a camera has another model or size, or a line is broken.
    """
    cameras: dict[str, tuple[tuple[int, int], Tensor]] = {}
    for line in _lines(folder / "cameras.txt"):
        number, model, width, height, *lens = line.split()
        values = [float(v) for v in lens]
        if model == "SIMPLE_PINHOLE" and len(values) == 3:
            values = [values[0], *values]
        elif model != "PINHOLE" or len(values) != 4:
            raise ValueError(
                f"camera {number} has model {model} with {len(values)} numbers; undistort the pictures first"
            )
        fx, fy, cx, cy = values
        k = torch.tensor([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]], dtype=torch.float64)
        cameras[number] = (int(height), int(width)), k
    rows = []
    # Every second line lists points of the picture and may be empty.
    for line in _lines(folder / "images.txt", blank=True)[::2]:
        try:
            _, *pose, camera, name = line.split(maxsplit=9)
            w, x, y, z, *shift = (float(v) for v in pose)
            size, k = cameras[camera]
        except (ValueError, KeyError) as error:
            raise ValueError(f"images.txt has the line {line[:80]!r}, which cannot be read: {error}") from None
        rotation = quaternion_to_matrix(torch.tensor([x, y, z, w], dtype=torch.float64))
        rows.append((name, size, torch.cat((rotation, torch.tensor(shift, dtype=torch.float64)[:, None]), 1), k))
    if len({size for _, size, _, _ in rows}) != 1:
        raise ValueError(f"pictures have sizes {sorted({size for _, size, _, _ in rows})}; wanted one")
    rows.sort(key=lambda row: row[0])
    names, sizes, poses, lenses = zip(*rows, strict=True)
    return PosedViews(names, sizes[0], torch.stack(poses), torch.stack(lenses)).checked()


def _lines(path: Path, *, blank: bool = False) -> list[str]:
    found = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return found if blank else [line for line in found if line.strip()]
