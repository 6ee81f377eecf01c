"""Rooms with objects, drawn by closed-form ray casting, with every map exact.

    scene = make_scene(SceneConfig(num_objects=(4, 8)), seed=0)
    view = render(scene, make_camera(scene, seed=0))    # colour, depth, normals, points, masks, classes, pose

**Conventions**, here and nowhere else; all other pages point to this one.

- *Frame of a camera* (OpenCV): x right, y down, z forward, in metres. Right-handed.
- *World*: the axes of a level camera that looks along z, so that y points down. The middle of the floor is the origin,
  the floor is at y = 0, heights are negative.
- *Extrinsics* take world to camera: ``p_camera = R @ p_world + t``, a matrix [4, 4] with last row (0, 0, 0, 1).
- *Intrinsics* [3, 3] are in pixels without skew: ``u = fx * x / z + cx``, ``v = fy * y / z + cy``.
- *Pixels*: (u, v) = (0, 0) is the outer corner of the upper left pixel, whose centre is (0.5, 0.5). Maps hold what the
  ray through the centre meets.
- *Panoramas*: longitude ``2 pi u / W - pi``, 0 along z and growing to the right; latitude ``pi / 2 - pi v / H``,
  positive upwards. A ray is (cos lat sin lon, -sin lat, cos lat cos lon) in the frame of the camera.
- *depth* is the coordinate z in the frame of the camera, *distance* is along the ray.
- *Normals* are unit vectors to the side from which the surface is seen: normal . ray < 0.
- *Rotations* as vectors: the axis times the angle in radians, right-handed. Camera angles are in degrees: yaw turns to
  the right, pitch up, roll clockwise.
- *Time* is in seconds; an object at time t has moved by ``t * velocity`` and turned by ``t * spin`` about its middle.
- *Maps* come channel first; masks have one row for each object, in the order of ``scene.objects``.
"""

from eff_embedded.scenes.cameras import Camera, Equirectangular, Lens, Pinhole
from eff_embedded.scenes.clips import Clip, render_clip
from eff_embedded.scenes.config import SceneConfig, Style
from eff_embedded.scenes.flow import Flow, optical_flow
from eff_embedded.scenes.geometry import pixel_grid, project_points, unproject_depth
from eff_embedded.scenes.make import make_scene
from eff_embedded.scenes.paths import make_camera, make_panorama, make_path, make_views, resized
from eff_embedded.scenes.render import render, render_views
from eff_embedded.scenes.scene import SIDES, Light, Room, Scene, SceneObject
from eff_embedded.scenes.textures import Texture
from eff_embedded.scenes.view import View
from eff_embedded.scenes.vocabulary import CLASSES, COLOURS, GROUPS, SYNONYMS, VOID

__all__ = [
    "CLASSES",
    "COLOURS",
    "GROUPS",
    "SIDES",
    "SYNONYMS",
    "VOID",
    "Camera",
    "Clip",
    "Equirectangular",
    "Flow",
    "Lens",
    "Light",
    "Pinhole",
    "Room",
    "Scene",
    "SceneConfig",
    "SceneObject",
    "Style",
    "Texture",
    "View",
    "make_camera",
    "make_panorama",
    "make_path",
    "make_scene",
    "make_views",
    "optical_flow",
    "pixel_grid",
    "project_points",
    "render",
    "render_clip",
    "render_views",
    "resized",
    "unproject_depth",
]
