"""The tiny models of these tests run, and each of their parts matters to the result."""

import pytest
import torch

MODELS = ("sd3", "sd3.5", "flux", "sd15", "sdxl")
PIPELINES = ("sd3", "sd3.5", "flux", "flux-fill", "sd15")


@pytest.mark.parametrize("name", MODELS)
def test_models_read_their_prompt(tiny, name):
    model = tiny.model(name)
    first = model(**tiny.inputs(model, count=2)).sample
    changed = tiny.inputs(model, count=2)
    changed["encoder_hidden_states"] = changed["encoder_hidden_states"].flip(1) * 2
    assert torch.isfinite(first).all()
    assert not torch.allclose(model(**changed).sample, first, atol=1e-6)


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_give_pictures(tiny, name):
    pipe = tiny.pipeline(name)
    more = {"image": torch.rand(1, 3, 64, 64), "mask_image": torch.ones(1, 1, 64, 64)} if "fill" in name else {}
    images = pipe(
        **tiny.prompts(pipe), **more, height=tiny.size, width=tiny.size, num_inference_steps=2, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert images.shape == (1, 3, tiny.size, tiny.size)
    assert images.std() > 0
