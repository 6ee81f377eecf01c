"""Vision models, losses, geometry and metrics, one sub-package each.

- `geometry`, `metrics`: cameras, poses, the sphere, files of other programs; scores with their averaging spelt out.
- `multiview`: cameras and depth of many views, and the layers that Lite3R swaps.
- `panorama`: segmentation, depth and normals of panoramas (MTPano).
- `amodal`: full masks of partly hidden objects (EoRaS).
- `projection_head`, `pixpro`, `unip`: parts of self-supervised training, and dense pre-training and distillation.
- `specvit`: land cover from hyperspectral pictures (LoLA-SpecViT).
- `scanpath`: the order in which people look (OAT).
- `brain_encoder`: encoding models of visual cortex.

Importing this package loads torch and nothing larger; transformers and scikit-learn are imported by the functions that
need them.
"""

from importlib.metadata import version

from eff_vision import geometry, metrics

__all__ = ["__version__", "geometry", "metrics"]

__version__ = version("eff-vision")
