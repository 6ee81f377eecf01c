"""Projections of a learnt concept in the place of the model's."""

import torch
from denoisers import make_sd3, sd3_row
from eff_guidance.attencraft import train_projections


def apply(model, change=0.1):
    handle, layers = train_projections(model)
    with torch.no_grad():
        for i, layer in enumerate(layers.values()):
            draw = torch.Generator().manual_seed(i)
            layer.weight.add_(torch.randn(layer.weight.shape, generator=draw), alpha=change)
    return handle


def load(folder):
    model = make_sd3()
    apply(model)
    model.load_state_dict(torch.load(folder / "state.pt"))
    return model


ROWS = [
    sd3_row(
        "attencraft",
        apply=apply,
        zero=lambda model: apply(model, change=0.0),
        save=lambda model, folder: torch.save(model.state_dict(), folder / "state.pt"),
        load=load,
        cannot={
            "twice": "is a ConceptLinear, not a plain linear layer",
            "stranger": "Sequential has no attention to text",
        },
    )
]
