"""Point clouds as binary glTF 2.0 (GLB), which viewers on the web open. glTF's y points up and z backwards."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eff_vision.geometry.formats.ply import check_cloud

_MAGIC, _JSON, _BIN = 0x46546C67, 0x4E4F534A, 0x004E4942
_POINTS, _FLOAT, _UBYTE = 0, 5126, 5121
_FLIP = np.array([1, -1, -1], np.float32)


def write_glb(path: Path, points: Tensor, colours: Tensor | None = None) -> None:
    """Write points [N, 3] of our world (y down), with colours from 0 to 1 [N, 3].

    Raises:
        ValueError: shapes are wrong, there is no point, or one is not finite.
    """
    check_cloud(points, colours)
    if not len(points):
        raise ValueError("glTF has no empty point cloud")
    places = np.ascontiguousarray(points.detach().cpu().float().numpy() * _FLIP)
    views = [{"buffer": 0, "byteOffset": 0, "byteLength": places.nbytes}]
    accessors: list[dict[str, Any]] = [
        {"bufferView": 0, "componentType": _FLOAT, "count": len(places), "type": "VEC3",
         "min": places.min(0).tolist(), "max": places.max(0).tolist()}
    ]  # fmt: skip
    attributes, body = {"POSITION": 0}, places.tobytes()
    if colours is not None:
        shades = (colours.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        whole = np.concatenate(
            (shades, np.full((len(shades), 1), 255, np.uint8)), 1
        )  # rows must be multiples of 4 bytes
        views.append({"buffer": 0, "byteOffset": len(body), "byteLength": whole.nbytes})
        accessors.append(
            {"bufferView": 1, "componentType": _UBYTE, "normalized": True, "count": len(whole), "type": "VEC4"}
        )
        attributes["COLOR_0"] = 1
        body += whole.tobytes()
    scene = {
        "asset": {"version": "2.0", "generator": "eff-vision"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": attributes, "mode": _POINTS}]}],
        "buffers": [{"byteLength": len(body)}],
        "bufferViews": views,
        "accessors": accessors,
    }
    text = json.dumps(scene).encode()
    text += b" " * (-len(text) % 4)
    head = struct.pack("<III", _MAGIC, 2, 28 + len(text) + len(body))
    path.write_bytes(head + struct.pack("<II", len(text), _JSON) + text + struct.pack("<II", len(body), _BIN) + body)


def read_glb(path: Path) -> tuple[Tensor, Tensor | None]:
    """Points and colours that `write_glb` wrote.

    Raises:
        ValueError: it is no such file.
    """
    data = path.read_bytes()
    if (
        len(data) < 28
        or struct.unpack_from("<II", data) != (_MAGIC, 2)
        or struct.unpack_from("<I", data, 8)[0] != len(data)
    ):
        raise ValueError(f"{path} is not a complete GLB file")
    size = struct.unpack_from("<I", data, 12)[0]
    try:
        scene = json.loads(data[20 : 20 + size])
        body = data[28 + size :]
        attributes = scene["meshes"][0]["primitives"][0]["attributes"]
        places = _array(scene, body, attributes["POSITION"], np.dtype("<f4"), 3)
        colours = None
        if "COLOR_0" in attributes:
            shades = _array(scene, body, attributes["COLOR_0"], np.dtype("u1"), 4)
            colours = torch.from_numpy(shades[:, :3].astype(np.float32) / 255)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} does not hold a point cloud of the form written here: {error}") from None
    return torch.from_numpy(places * _FLIP), colours


def _array(scene: dict[str, Any], body: bytes, accessor: int, kind: Any, width: int) -> Any:
    count = scene["accessors"][accessor]["count"]
    start = scene["bufferViews"][scene["accessors"][accessor]["bufferView"]]["byteOffset"]
    return np.frombuffer(body, kind, count * width, start).reshape(count, width)
