"""From depth to points and back: two views of a room agree in one frame, and a point cloud is written as PLY.

uv run --extra train examples/vision_depth_to_points.py room.ply
"""

import sys
from pathlib import Path

import torch
from eff_embedded import scenes
from eff_vision.geometry import unproject
from eff_vision.geometry.formats import write_ply
from eff_vision.metrics import depth_metrics

file = Path(sys.argv[1] if len(sys.argv) > 1 else "room.ply")
scene = scenes.make_scene(scenes.SceneConfig(num_objects=(4, 8)), seed=0)
points, colours = [], []
for seed in range(3):
    camera = scenes.make_camera(scene, seed=seed, size=(96, 96))
    view = scenes.render(scene, camera)
    local = unproject(view.depth, view.intrinsics)  # [96, 96, 3], in the camera's frame: x right, y down, z ahead
    rotation, shift = view.extrinsics[:3, :3], view.extrinsics[:3, 3]  # world to camera
    world = (local - shift) @ rotation
    print(f"view {seed}: largest error {float((world - view.points.movedim(0, -1)).abs().max()):.1e} m")
    points.append(world.reshape(-1, 3))
    colours.append(view.colour.movedim(0, -1).reshape(-1, 3))
write_ply(file, torch.cat(points), torch.cat(colours))

noisy = view.depth * (1 + 0.05 * torch.randn(view.depth.shape, generator=torch.Generator().manual_seed(0)))
print(f"a depth map with 5 % noise: {depth_metrics(noisy[None], view.depth[None])}")
