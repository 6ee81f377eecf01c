"""Attention variants, and ways to see and steer attention, one sub-package each.

- `neighborhood`: windows around each token, with natten's functions; the only names exported here.
- `sparse_linear`: softmax over critical blocks, linear attention over the rest.
- `layer_reuse`: long contexts decoded with keys that an earlier layer chose.
- `variants`: seven token mixers for language models, and hybrids of them.
- `random_features`: frozen random heads, fitted in closed form.
- `sink_calibration` (ACT), `visual_sinks` (VAR), `head_reinforcement` (VHD, VHR), `grounded_attention` (PAINT, PAI),
  `contrastive_focus` (CARVE): attention steered without training.
- `position_bias`: what each position of a text contributes through all layers.
- `hallucination`: CHAIR, POPE, AMBER and MMHal.

Importing this package loads torch and nothing larger; transformers is imported by the functions that need it.
"""

from importlib.metadata import version

from eff_attention.neighborhood import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    na1d,
    na2d,
    na3d,
    neighborhood_attention,
)

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "__version__",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
]

__version__ = version("eff-attention")
