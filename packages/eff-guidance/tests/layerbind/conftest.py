"""A layout of two boxes that overlap, and its prompts, for tiny pipelines."""

import pytest
import torch


class Scene:
    """``scene.layout``, ``scene.prompts(pipe)``, ``scene.draw(pipe, ...)``."""

    steps = 4

    def __init__(self, tiny):
        from eff_guidance.layerbind import Layer, Layout

        self.tiny = tiny
        self.layout = Layout(
            background="a meadow",
            layers=(Layer(prompt="a bee", box=(0.25, 0.25, 0.75, 0.75)), Layer(prompt="a mouse", box=(0.5, 0.5, 1, 1))),
        )

    def prompts(self, pipe, count=2, *, seed=50, tokens=(5, 4, 7)):
        from eff_guidance.layerbind import LayoutPrompts, Prompt

        width = 32 if "Flux" in type(pipe).__name__ else 64
        draw = torch.Generator().manual_seed(seed)
        made = [
            Prompt(torch.randn(tokens[i % 3], 32, generator=draw), torch.randn(width, generator=draw))
            for i in range(count + 1)
        ]
        return LayoutPrompts(made[0], made[1:])

    def draw(self, pipe, *, seed=3, count=1, **more):
        size = self.tiny.size
        given = {**self.tiny.prompts(pipe, count=count), "num_inference_steps": self.steps, **more}
        drawn = torch.Generator().manual_seed(seed)
        return pipe(height=size, width=size, generator=drawn, output_type="latent", **given).images


@pytest.fixture
def scene(tiny):
    return Scene(tiny)
