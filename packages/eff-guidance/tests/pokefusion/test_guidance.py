"""Guidance by two scales, losses, and files."""

import json

import pytest
import torch
from eff_guidance.pokefusion import (
    StyleAttentionHandle,
    condition_dropout,
    style_guider,
    style_statistics_loss,
    two_scale_guidance,
)


def test_two_scales():
    none, text, full = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(two_scale_guidance(none, text, full, 3.0, 3.0), none + 3 * (full - none))
    assert torch.equal(two_scale_guidance(none, text, full, 3.0, 0.0), none + 3.0 * (text - none) + 0.0)
    assert torch.allclose(two_scale_guidance(none, text, full, 2.0, 5.0), none + 2 * (text - none) + 5 * (full - text))


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_in_a_pipeline(tiny, styled, name):
    """A ratio of scales, through the pipeline's own formula, is the formula of two scales."""
    pipe = tiny.pipeline(name)
    model = getattr(pipe, "unet", None) or pipe.transformer
    handle = styled(pipe)

    def one_step(**use):
        with handle.use(**use):
            return pipe(
                **tiny.prompts(pipe), height=64, width=64, num_inference_steps=1, output_type="latent",
                guidance_scale=3.0, generator=torch.Generator().manual_seed(0),
            ).images  # fmt: skip

    passes = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    text, full, more = one_step(strength=0.0), one_step(), one_step(guidance_ratio=2.0)
    hook.remove()
    # One step of the sampler is affine in the prediction, so that latents combine as predictions do.
    assert torch.allclose(more, text + 2 * (full - text), atol=1e-4)
    assert torch.allclose(one_step(guidance_ratio=0.0), text, atol=1e-6)
    assert not torch.allclose(full, text, atol=1e-4)


def test_guider(tiny, styled):
    """A loop as modular pipelines run it, against three passes by hand."""
    pipe = tiny.pipeline("sd3")
    model = pipe.transformer
    handle = styled(pipe, num_styles=2)
    given = tiny.inputs(model, seed=1)
    other = tiny.inputs(model, seed=2)
    fields = {
        "encoder_hidden_states": (given["encoder_hidden_states"], other["encoder_hidden_states"]),
        "pooled_projections": (given["pooled_projections"], other["pooled_projections"]),
    }

    @torch.no_grad()
    def passed(batch):
        named = {k: getattr(batch, k) for k in fields}
        return model(hidden_states=given["hidden_states"], timestep=given["timestep"], **named).sample

    def step(guider, i):
        guider.set_state(step=i, num_inference_steps=4, timestep=given["timestep"])
        batches = guider.prepare_inputs(fields)
        for batch in batches:
            guider.prepare_models(model)
            batch.noise_pred = passed(batch)
            guider.cleanup_models(model)
        return batches, guider(batches).pred

    guider = style_guider(handle, text_scale=2.0, style_scale=5.0, style_ids=1)
    batches, got = step(guider, 0)
    assert len(batches) == 3
    none, text = passed(batches[1]), passed(batches[2])
    with handle.use(1):
        full = passed(batches[0])
    assert not torch.equal(full, text)
    assert torch.equal(got, two_scale_guidance(none, text, full, 2.0, 5.0))
    late = type(guider)(text_scale=2.0, style_scale=5.0, stop=0.5)
    late.bind(handle, {"style_ids": 1})
    batches, got = step(late, 3)
    assert len(batches) == 1
    assert torch.equal(got, full)
    assert late.config["stop"] == 0.5
    with pytest.raises(RuntimeError, match="no style adapter"):
        step(type(guider)(), 0)


def test_dropout_of_conditions():
    drop = condition_dropout(20000, generator=torch.Generator().manual_seed(0))
    both = (drop.text & drop.style).float().mean()
    assert abs(both - 0.05) < 0.01
    assert abs((drop.text & ~drop.style).float().mean() - 0.1) < 0.01
    assert abs((drop.style & ~drop.text).float().mean() - 0.1) < 0.01
    with pytest.raises(ValueError, match="sum to at most 1"):
        condition_dropout(3, text=0.9, style=0.2)


def test_statistics():
    x = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.1, 0.2]), torch.tensor([1.0, 2.0])
    want = sum((x[b, c].mean() - mean[c]) ** 2 + (x[b, c].std() - std[c]) ** 2 for b in range(3) for c in range(2))
    assert torch.allclose(style_statistics_loss(x, mean, std), want / 3)
    packed = x.flatten(2).mT
    assert torch.allclose(style_statistics_loss(packed, mean, std, channels=-1), want / 3)


@pytest.mark.parametrize("name", ["sd15", "sd15-v", "sd3", "flux"])
def test_loss_is_the_backbone_s_own(tiny, styled, name):
    name, _, velocity = name.partition("-")
    pipe = tiny.pipeline(name)
    if velocity:
        pipe.scheduler.register_to_config(prediction_type="v_prediction")
    model = getattr(pipe, "unet", None) or pipe.transformer
    handle = styled(pipe)
    given = tiny.inputs(model, count=2)
    key = "sample" if name == "sd15" else "hidden_states"
    latents, text = given.pop(key), given.pop("encoder_hidden_states")
    given.pop("timestep")
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([100, 700])
    got = handle.train_step(latents, noise, t, text, **given)
    level = (t / 1000).reshape(-1, *[1] * (latents.dim() - 1))
    noisy = (1 - level) * latents + level * noise
    target = noise - latents
    if name == "sd15":
        alpha = pipe.scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        noisy, target = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, noise
        if velocity:
            target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    with handle.use(), torch.no_grad():
        made = model(
            **{key: noisy}, timestep=t / 1000 if name == "flux" else t, encoder_hidden_states=text, **given
        ).sample
    assert torch.allclose(got, (made - target).square().mean(), rtol=1e-5)
    got.backward()
    assert handle.adapter.style.table.grad.abs().sum() > 0
    axis = -1 if name == "flux" else 1
    mean, std = torch.zeros(latents.shape[axis]), torch.ones(1)
    more = handle.train_step(latents, noise, t, text, statistics=(mean, std), statistics_weight=2.0, **given)
    clean = noisy - level * made
    if name == "sd15":
        clean = (noisy - (1 - alpha).sqrt() * made) / alpha.sqrt()
        if velocity:
            clean = alpha.sqrt() * noisy - (1 - alpha).sqrt() * made
    added = 2 * style_statistics_loss(clean[:1], mean, std, channels=axis)  # the second sample is too early
    assert torch.allclose(more - got, added, rtol=1e-4)
    same = handle.train_step(latents, noise, t + 290, text, statistics=(mean, std), **given)
    assert torch.allclose(same, handle.train_step(latents, noise, t + 290, text, **given))


def test_files(tiny, styled, tmp_path):
    pipe = tiny.pipeline("sd15")
    handle = styled(pipe, num_styles=2, layers=("up_blocks",))
    handle.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    names = set(load_file(tmp_path / "style_adapter.safetensors"))
    first = handle.adapter.names[0]
    assert {"style.table", f"layers.{first}.to_k_style.weight", f"layers.{first}.gate"} <= names
    assert json.loads((tmp_path / "style_config.json").read_text())["base"] == "UNet2DConditionModel"
    other = tiny.pipeline("sd15", seed=7)  # another checkpoint of the class
    loaded = StyleAttentionHandle.from_pretrained(other, tmp_path)
    assert loaded.adapter.config == handle.adapter.config
    for name, value in handle.adapter.state_dict().items():
        assert torch.equal(loaded.adapter.state_dict()[name], value)
    given = tiny.inputs(other.unet)
    with torch.no_grad():
        before = other.unet(**given).sample
        with loaded.use(1):
            assert not torch.equal(other.unet(**given).sample, before)
    handle.adapter.bfloat16()
    handle.save_pretrained(tmp_path / "half")
    loaded.remove()
    assert StyleAttentionHandle.from_pretrained(other, tmp_path / "half").adapter.style.table.dtype == torch.bfloat16


def test_files_of_other_models(tiny, styled, tmp_path):
    styled(tiny.model("sd15")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained on UNet2DConditionModel, this is SD3Transformer2DModel"):
        StyleAttentionHandle.from_pretrained(tiny.model("sd3"), tmp_path)
    styled(tiny.model("sd3")).save_pretrained(tmp_path / "sd3")
    with pytest.raises(ValueError, match=r"transformer_blocks.1.attn: the adapter's keys are \[16, 16\]"):
        StyleAttentionHandle.from_pretrained(tiny.model("sd3", heads=4), tmp_path / "sd3")
