"""Style acts inside of ``with handle.use(...)``; the row looks at that through a module that enters it."""

import torch
from denoisers import TINY, denoise, latents
from eff_guidance.pokefusion import StyleAttentionConfig, StyleAttentionHandle, add_style_attention
from method_table import Row
from torch import nn

CONFIG = StyleAttentionConfig(style_dim=16, tokens_per_style=4, layers="all")


class Styled(nn.Module):
    """A denoiser, and the handle of its style."""

    def __init__(self):
        super().__init__()
        self.inner, self.handle = TINY.sd3_transformer(layers=2), None


def apply(model, gate=0.5):
    torch.manual_seed(1)
    model.handle = add_style_attention(model.inner, CONFIG)
    with torch.no_grad():
        model.handle.adapter.style.table.mul_(50)
        for name in model.handle.adapter.names:
            model.handle.adapter.layer(name).gate.fill_(gate)
    return model.handle


def run(model, x, mask=None):
    if model.handle is None or not model.handle.report.changed:
        return denoise(model.inner, x)
    with model.handle.use(0, unconditional=0):
        return denoise(model.inner, x)


def load(folder):
    model = Styled()
    model.handle = StyleAttentionHandle.from_pretrained(model.inner, folder)
    return model


ROWS = [
    Row(
        name="pokefusion",
        host="other",
        make=Styled,
        apply=apply,
        zero=lambda model: apply(model, gate=0.0),
        run=run,
        data=latents,
        save=lambda model, folder: model.handle.save_pretrained(folder),
        load=load,
        absent={
            "deepcopy": "a copy of the model needs a use of its own, which its package tests",
            "pickle": "as deepcopy",
            "compiled": "its package compiles the model inside of a use",
            "under_peft": "its package tests LoRA on the model inside of a use",
            "stranger": "made around a denoiser here",
        },
        cannot={"twice": "has a style adapter already; remove that handle first"},
    )
]
