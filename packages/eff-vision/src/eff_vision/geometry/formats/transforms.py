"""transforms.json of NeRF programs: camera to world, x right, y up, z backwards (OpenGL)."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from eff_vision.geometry.formats.posed import PosedViews
from eff_vision.geometry.poses import invert_pose

_FLIP = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)


def write_transforms(path: Path, views: PosedViews) -> None:
    """Write the file, with the intrinsics of each picture next to its pose."""
    views = views.checked()
    height, width = views.size
    frames = []
    for name, pose, k in zip(views.names, invert_pose(views.extrinsics), views.intrinsics, strict=True):
        matrix = torch.eye(4, dtype=torch.float64)
        matrix[:3, :3], matrix[:3, 3] = pose[:, :3] * _FLIP, pose[:, 3]
        lens = {"fl_x": k[0, 0], "fl_y": k[1, 1], "cx": k[0, 2], "cy": k[1, 2]}
        frames.append(
            {"file_path": name, "transform_matrix": matrix.tolist(), **{n: float(v) for n, v in lens.items()}}
        )
    path.write_text(json.dumps({"camera_model": "OPENCV", "w": width, "h": height, "frames": frames}, indent=1))


def read_transforms(path: Path) -> PosedViews:
    """Read a file whose intrinsics stand with the frames, for all, or as ``camera_angle_x``.

    Raises:
        ValueError: something is missing, or there is distortion.
    """
    found = json.loads(path.read_text())
    frames = found.get("frames", []) if isinstance(found, dict) else []
    if not frames:
        raise ValueError(f"{path} has no frames")
    names, poses, lenses, size = [], [], [], (int(found.get("h", 0)), int(found.get("w", 0)))
    if min(size) < 1:
        raise ValueError(f"{path} does not give w and h of the pictures")
    for frame in frames:
        both = {**found, **frame}
        if bent := [n for n in ("k1", "k2", "k3", "k4", "p1", "p2") if both.get(n)]:
            raise ValueError(f"{path}: {frame.get('file_path')} has distortion {bent}; undistort the pictures first")
        matrix = torch.tensor(both["transform_matrix"], dtype=torch.float64)
        turned = torch.cat((matrix[:3, :3] * _FLIP, matrix[:3, 3:]), 1)
        poses.append(invert_pose(turned))
        fx = both.get("fl_x")
        if fx is None and "camera_angle_x" in both:
            fx = size[1] / (2 * torch.tan(torch.tensor(both["camera_angle_x"] / 2, dtype=torch.float64)).item())
        if fx is None:
            raise ValueError(f"{path} has neither fl_x nor camera_angle_x")
        k = torch.eye(3, dtype=torch.float64)
        k[0, 0], k[1, 1] = fx, both.get("fl_y", fx)
        k[0, 2], k[1, 2] = both.get("cx", size[1] / 2), both.get("cy", size[0] / 2)
        lenses.append(k)
        names.append(str(both["file_path"]))
    return PosedViews(tuple(names), size, torch.stack(poses), torch.stack(lenses)).checked()
