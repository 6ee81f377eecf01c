"""Control of diffusion transformers, one sub-package a method.

- `head_guidance`: guidance by damaged attention heads (SoftPAG), and the search for heads (HeadHunter).
- `layerbind`: boxes with prompts, ordered front to back.
- `context_brush`: the subject of one picture painted into a hole of another.
- `attencraft`: several concepts learnt from one picture.
- `pokefusion`: a learnt style without a reference picture.
- `refam`: pointing at what a phrase names.
- `alignment` (HASTE) and `memory_bank` (Repulsor): losses that shape a model's representations in training;
  `training`: what the two share.

Importing this package loads torch and nothing larger; the functions that need diffusers or transformers import them.
"""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("eff-guidance")
