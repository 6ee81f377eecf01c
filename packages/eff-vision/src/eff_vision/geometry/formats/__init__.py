"""Cameras and points in the files of other programs: COLMAP's text, NeRF's transforms.json, PLY, GLB.

In memory everything keeps the one convention of `eff_vision.geometry`; only these functions know others.
"""

from eff_vision.geometry.formats.colmap import read_colmap, write_colmap
from eff_vision.geometry.formats.glb import read_glb, write_glb
from eff_vision.geometry.formats.ply import read_ply, write_ply
from eff_vision.geometry.formats.posed import PosedViews
from eff_vision.geometry.formats.transforms import read_transforms, write_transforms

__all__ = [
    "PosedViews",
    "read_colmap",
    "read_glb",
    "read_ply",
    "read_transforms",
    "write_colmap",
    "write_glb",
    "write_ply",
    "write_transforms",
]
