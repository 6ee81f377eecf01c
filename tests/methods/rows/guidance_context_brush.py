import torch
from denoisers import make_sd3, sd3_row
from eff_guidance.context_brush import CanvasSpans, ContextBrushConfig, apply_incontext_brush

SPANS = CanvasSpans(grid=(8, 8), subjects=((0, 0, 4, 8),), query=(4, 0, 8, 8))
CONFIG = ContextBrushConfig(shift_image=0.5)
OFF = ContextBrushConfig(shift_image=0, shift_text=0, head_gain=0)


def load(folder):
    model = make_sd3()
    apply_incontext_brush(model, SPANS, ContextBrushConfig.from_dict(torch.load(folder / "config.pt")))
    return model


ROWS = [
    sd3_row(
        "context_brush",
        apply=lambda model: apply_incontext_brush(model, SPANS, CONFIG),
        zero=lambda model: apply_incontext_brush(model, SPANS, OFF),
        save=lambda model, folder: torch.save(CONFIG.to_dict(), folder / "config.pt"),
        load=load,
        cannot={
            "twice": "has a brush already; remove that handle first",
            "stranger": "Sequential has no joint attention of text and picture tokens",
        },
    )
]
