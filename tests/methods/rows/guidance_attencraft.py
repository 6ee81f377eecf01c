"""Projections of a learnt concept in the place of the model's."""

import torch
from denoisers import make_sd3, sd3_row
from eff_guidance.attencraft import train_projections
from method_table import kept_by_state


def apply(model, change=0.1):
    handle, layers = train_projections(model)
    with torch.no_grad():
        for i, layer in enumerate(layers.values()):
            draw = torch.Generator().manual_seed(i)
            layer.weight.add_(torch.randn(layer.weight.shape, generator=draw), alpha=change)
    return handle


ROWS = [
    sd3_row(
        "attencraft",
        apply=apply,
        zero=lambda model: apply(model, change=0.0),
        **kept_by_state(make_sd3, apply),
        cannot={
            "twice": "is a ConceptLinear, not a plain linear layer",
            "stranger": "Sequential has no attention to text",
        },
    )
]
