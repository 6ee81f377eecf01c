"""Cameras, poses and the sphere, in one convention.

- A camera looks along +z, x points right and y down (OpenCV). Extrinsics map the world to it: ``x_cam = R x + t``.
- Pixel (row i, column j) has its centre at (j + 0.5, i + 0.5); intrinsics are in pixels of that system.
- z-depth is the z coordinate in the camera; radial depth is the distance from the camera.
- A panorama is equirectangular and twice as wide as high. Column centres have longitude ``2 pi (j + 0.5) / W - pi``
  (0 is ahead, positive to the right), row centres latitude ``pi / 2 - pi (i + 0.5) / H`` (positive is up, which is -y).
- Normals point towards the camera.
"""

from eff_vision.geometry.cameras import (
    fov_from_intrinsics,
    intrinsics_from_fov,
    pixel_grid,
    pixel_rays,
    project,
    radial_to_z,
    unproject,
    z_to_radial,
)
from eff_vision.geometry.pose_code import decode_pose, encode_pose
from eff_vision.geometry.poses import (
    invert_pose,
    matrix_to_quaternion,
    quaternion_to_matrix,
    relative_poses,
    rotation_angle,
    transform_points,
)
from eff_vision.geometry.sphere import (
    erp_angles,
    erp_area_weights,
    erp_rays,
    erp_to_perspective,
    perspective_to_erp,
    rotation_from_yaw_pitch,
)

__all__ = [
    "decode_pose",
    "encode_pose",
    "erp_angles",
    "erp_area_weights",
    "erp_rays",
    "erp_to_perspective",
    "fov_from_intrinsics",
    "intrinsics_from_fov",
    "invert_pose",
    "matrix_to_quaternion",
    "perspective_to_erp",
    "pixel_grid",
    "pixel_rays",
    "project",
    "quaternion_to_matrix",
    "radial_to_z",
    "relative_poses",
    "rotation_angle",
    "rotation_from_yaw_pitch",
    "transform_points",
    "unproject",
    "z_to_radial",
]
