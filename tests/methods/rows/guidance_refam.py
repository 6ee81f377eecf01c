"""Maps between words and places, read while a transformer runs."""

import torch
from denoisers import denoise, sd3_row
from eff_guidance.refam import capture_joint_attention


def run(model, x, mask=None):
    with torch.no_grad(), capture_joint_attention(model) as seen:
        denoise(model, x)
    return torch.stack([*seen.maps.values()], 1)


ROWS = [
    sd3_row("refam", kind="measure", float32=True, run=run, apply=lambda model: run(model, torch.ones(1, 4, 16, 16)))
]
