"""Vision models, losses, geometry and metrics: 3-D from many views, panoramas, segmentation, gaze, hyperspectral pictures, brain encoding."""
