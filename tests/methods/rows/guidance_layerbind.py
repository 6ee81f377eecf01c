"""A layout changes what a pipeline draws; the row holds a pipeline of SD3 in a module and looks at its latents."""

import torch
from denoisers import TINY, latents
from eff_guidance.layerbind import Layer, LayerBindConfig, Layout, LayoutPrompts, Prompt, apply_layerbind
from method_table import Row
from torch import nn

LAYOUT = Layout(
    background="a meadow",
    layers=(Layer(prompt="a bee", box=(0.25, 0.25, 0.75, 0.75)), Layer(prompt="a mouse", box=(0.5, 0.5, 1, 1))),
)


class Pipeline(nn.Module):
    """A pipeline as a module."""

    def __init__(self):
        super().__init__()
        self.pipe = TINY.sd3_pipeline(layers=2)
        self.transformer = self.pipe.transformer


def prompts():
    draw = torch.Generator().manual_seed(50)
    made = [Prompt(torch.randn(4, 32, generator=draw), torch.randn(64, generator=draw)) for _ in range(3)]
    return LayoutPrompts(made[0], made[1:])


def apply(model, config=None):
    return apply_layerbind(model.pipe, LAYOUT, config, prompts=prompts())


def run(model, x, mask=None):
    """Latents after three steps from ``x``."""
    words = TINY.prompts(model.pipe, count=1)
    words = {name: value.expand(len(x), *value.shape[1:]) for name, value in words.items()}
    return model.pipe(
        height=TINY.SIZE, width=TINY.SIZE, latents=x, num_inference_steps=3, output_type="latent", **words
    ).images


def load(folder):
    model = Pipeline()
    apply_layerbind(model.pipe, Layout.load(folder / "layout.json"), prompts=prompts())
    return model


ROWS = [
    Row(
        name="layerbind",
        host="other",
        make=Pipeline,
        apply=apply,
        zero=lambda model: apply(model, LayerBindConfig(eta1=0, eta2=0)),
        run=run,
        data=latents,
        save=lambda model, folder: LAYOUT.save(folder / "layout.json"),
        load=load,
        absent={
            "bf16": "pipelines are made in their dtype",
            "autocast": "as bf16",
            "gradients": "drawing has no gradient",
            "compiled": "its package compiles the transformer inside of a pipeline",
            "under_peft": "its package puts LoRA into the transformer inside of a pipeline",
            "threads": "schedulers of diffusers count steps themselves: a pipeline draws in one thread",
            "stranger": "made around a pipeline here",
        },
        cannot={"twice": "has a layout already; remove its handle first"},
    )
]
