"""Blending of latents and the whole recipe."""

import numpy as np
import pytest
import torch
from eff_guidance.context_brush import (
    ContextBrushConfig,
    LatentBlendCallback,
    build_incontext_canvas,
    incontext_insert,
    noised_source,
)
from eff_guidance.context_brush.insert import encode_canvas, pack, token_mask

Image = pytest.importorskip("PIL.Image")


def parts(seed=0, width=56, height=40):
    rng = np.random.default_rng(seed)
    target = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
    hole = np.zeros((height, width), bool)
    hole[10:20, 20:40] = True
    return Image.new("RGBA", (30, 20), (255, 0, 0, 255)), target, hole


def make(pipe, tiny, *, seed=0, count=1, **more):
    return incontext_insert(
        pipe, *parts(), canvas={"size": (32, 48)}, generator=torch.Generator().manual_seed(seed),
        num_inference_steps=2, **tiny.prompts(pipe, count=count), **more,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["flux-fill", "flux", "sd3"])
def test_the_rest_stays_bit_for_bit(tiny, name):
    pipe = tiny.pipeline(name)
    _, target, hole = parts()
    before = np.asarray(target)
    for feather in (0, 2):
        images = make(pipe, tiny, count=2, config=ContextBrushConfig(feather=feather))
        assert len(images) == 2
        for image in images:
            after = np.asarray(image)
            near = np.zeros_like(hole)
            near[10 - feather : 20 + feather, 20 - feather : 40 + feather] = True
            assert np.array_equal(after[~near], before[~near])
            assert (after[hole] != before[hole]).any(-1).mean() > 0.5
    assert not any("forward" in vars(m) for m in pipe.transformer.modules())


def test_strengths_matter_and_seeds_repeat(tiny):
    pipe = tiny.pipeline("flux-fill", guidance=True)
    plain, brushed, again = (
        np.asarray(make(pipe, tiny, config=ContextBrushConfig(shift_image=s, feather=None))[0]) for s in (0, 5, 5)
    )
    assert np.array_equal(brushed, again)
    assert not np.array_equal(plain, brushed)
    assert plain.shape == (32, 48, 3)


@pytest.mark.parametrize("name", ["flux-fill", "sd3"])
def test_latents_outside_of_the_hole_are_the_canvas_s(tiny, name):
    pipe = tiny.pipeline(name)
    packed = name != "sd3"
    canvas = build_incontext_canvas(*parts(), size=(32, 48), token=8)
    source = encode_canvas(pipe, canvas, packed=packed)
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(1))
    more = {"image": canvas.image, "mask_image": canvas.mask} if packed else {}

    def latents(hole):
        return pipe(
            **tiny.prompts(pipe), **more, height=64, width=48, num_inference_steps=3, output_type="latent",
            generator=torch.Generator().manual_seed(2), latents=noise.clone(),
            callback_on_step_end_tensor_inputs=["latents"],
            callback_on_step_end=None if hole is None else LatentBlendCallback(source, noise, hole),
        ).images  # fmt: skip

    hole = token_mask(canvas, 8, packed=packed, cells=4)
    found = latents(hole)
    where = hole.expand_as(found)
    assert 0 < where.float().mean() < 0.5
    assert torch.equal(found[~where], source[~where])
    assert (found[where] != source[where]).all()
    assert torch.equal(latents(torch.ones_like(hole)), latents(None))


def test_noised_source():
    source, noise = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).split(1)
    assert torch.equal(noised_source(source, noise, 1.0), noise)
    assert torch.equal(noised_source(source, noise, 0.0), source)
    assert torch.allclose(noised_source(source, noise, 0.25), 0.75 * source + 0.25 * noise)


def test_packing_is_flux_s(tiny):
    pipe = tiny.pipeline("flux")
    x = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack(x), pipe._pack_latents(x, 2, 4, 6, 8))


def test_a_callback_of_the_user_runs_too(tiny):
    pipe = tiny.pipeline("sd3")
    seen = []

    def callback(pipe, step, timestep, kwargs):
        seen.append((step, sorted(kwargs)))
        return kwargs

    make(pipe, tiny, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert seen == [(0, ["latents", "prompt_embeds"]), (1, ["latents", "prompt_embeds"])]


def test_several_generators(tiny):
    pipe = tiny.pipeline("sd3")
    more = {"canvas": {"size": (32, 48)}, "num_inference_steps": 2, "guidance_scale": 1.0}
    embeds = tiny.prompts(pipe, guided=False)
    both = {k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in embeds.items()}
    seeds = [torch.Generator().manual_seed(s) for s in (3, 4)]
    two = incontext_insert(pipe, *parts(), generator=seeds, **both, **more)
    one = incontext_insert(pipe, *parts(), generator=torch.Generator().manual_seed(4), **embeds, **more)
    assert np.abs(np.asarray(two[1]).astype(int) - np.asarray(one[0])).max() <= 1


def test_refusals(tiny):
    pipe = tiny.pipeline("sd3")
    with pytest.raises(ValueError, match=r"\['height', 'latents'\] are set by incontext_insert"):
        make(pipe, tiny, height=3, latents=None)
    with pytest.raises(ValueError, match="nothing would be kept"):
        make(pipe, tiny, config=ContextBrushConfig(blend=False))
    with pytest.raises(TypeError, match="bool"):
        LatentBlendCallback(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="equally many dimensions"):
        LatentBlendCallback(torch.zeros(1, 2, 1), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool))
    blend = LatentBlendCallback(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(KeyError, match="must name 'latents'"):
        blend(pipe, 0, 0, {})
    with pytest.raises(RuntimeError, match="does not give the noise level"):
        blend(type("P", (), {"scheduler": object()})(), 0, 0, {"latents": torch.zeros(1, 2)})
