"""SoftPAG in ordinary pipelines, against loops written out."""

import copy

import pytest
import torch
from eff_guidance.head_guidance import (
    SoftPAGConfig,
    apply_head_guidance,
    guide,
    guide_with_cfg,
    perturbed_heads,
)

KINDS = ["sd3", "sd3.5", "flux", "flux-fill", "sd15"]
STEPS = 4


def denoiser(pipe):
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def make(pipe, given, *, steps=STEPS, seed=1, **call):
    if "Fill" in type(pipe).__name__:
        call = {"image": torch.full((1, 3, 64, 64), 0.5), "mask_image": torch.ones(1, 1, 64, 64), **call}
    noise = torch.Generator().manual_seed(seed)
    torch.manual_seed(0)
    return pipe(
        **given, height=64, width=64, num_inference_steps=steps, output_type="latent", generator=noise, **call
    ).images


CONFIG = SoftPAGConfig(heads=[(0, 0), (2, 1)], scale=2.0)


def test_algebra():
    gen = torch.Generator().manual_seed(0)
    cond, uncond, damaged = torch.randn(3, 2, 4, generator=gen)
    assert torch.equal(guide(cond, damaged, scale=0), cond)
    assert torch.equal(guide(cond, cond, scale=7.0), cond)
    torch.testing.assert_close(guide(cond, damaged, scale=2.0), 3 * cond - 2 * damaged)
    # away from the damage, not towards it
    assert torch.dot((guide(cond, damaged, scale=2.0) - cond).flatten(), (cond - damaged).flatten()) > 0
    both = guide_with_cfg(cond, uncond, damaged, guidance_scale=4.0, scale=2.0)
    torch.testing.assert_close(both, uncond + 4 * (cond - uncond) + 2 * (cond - damaged))
    plain = uncond + 4.0 * (cond - uncond)
    assert torch.equal(guide_with_cfg(cond, uncond, damaged, guidance_scale=4.0, scale=0), plain)
    assert torch.equal(guide_with_cfg(cond, uncond, cond, guidance_scale=4.0, scale=9.0), plain)
    torch.testing.assert_close(
        guide_with_cfg(cond, uncond, damaged, guidance_scale=1.0, scale=2.0), guide(cond, damaged, scale=2.0)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_off_is_bit_identical_and_removing_gives_the_pipeline_back(tiny, kind):
    pipe = tiny.pipeline(kind)
    given = tiny.prompts(pipe)
    before, own = make(pipe, given), set(vars(denoiser(pipe)))
    for config in (
        SoftPAGConfig(heads="all", scale=0.0),
        SoftPAGConfig(heads=[]),
        SoftPAGConfig(heads="all", strength=0.0),
        SoftPAGConfig(heads="all", start=0.5, stop=0.5),
    ):
        with apply_head_guidance(pipe, config):
            assert torch.equal(make(pipe, given), before)
    handle = apply_head_guidance(pipe, CONFIG)
    guided = make(pipe, given)
    assert not torch.allclose(guided, before)
    handle.disable()
    assert torch.equal(make(pipe, given), before)
    handle.enable()
    assert torch.equal(make(pipe, given), guided)
    handle.remove()
    assert torch.equal(make(pipe, given), before)
    assert set(vars(denoiser(pipe))) == own


def by_hand(pipe, given, config, *, scale_of_cfg, steps=STEPS, seed=1, window=range(STEPS)):
    """A loop over an SD3 pipeline's parts, with one forward a prediction."""
    model, scheduler = pipe.transformer, copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    batch = len(given["prompt_embeds"])
    x = torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def predict(x, t, name):
        return model(
            x, given[f"{name}prompt_embeds"], given[f"{name}pooled_prompt_embeds"], t.expand(batch), return_dict=False
        )[0]

    for i, t in enumerate(scheduler.timesteps):
        cond = predict(x, t, "")
        with perturbed_heads(model, config):
            damaged = predict(x, t, "")
        scale = config.scale if i in window else 0.0
        if scale_of_cfg > 1:
            pred = guide_with_cfg(cond, predict(x, t, "negative_"), damaged, guidance_scale=scale_of_cfg, scale=scale)
        else:
            pred = guide(cond, damaged, scale=scale)
        x = scheduler.step(pred, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("cfg", [1.0, 5.0])
@pytest.mark.parametrize("batched", [False, True])
def test_sd3_equals_a_loop_by_hand(tiny, cfg, batched):
    """The damaged pass has the prompt, and w comes through whatever the scale of CFG."""
    pipe = tiny.pipeline("sd3.5")
    given = tiny.prompts(pipe, count=2)
    config = SoftPAGConfig(heads=[(0, 1), (1, 0), (0, 0, "attn2")], strength=0.6, scale=2.5)
    with apply_head_guidance(pipe, config, batched=batched):
        found = make(pipe, given, guidance_scale=cfg)
    torch.testing.assert_close(found, by_hand(pipe, given, config, scale_of_cfg=cfg), rtol=1e-4, atol=1e-4)


def test_the_window_includes_its_first_step_and_not_its_last(tiny):
    pipe = tiny.pipeline("sd3")
    given = tiny.prompts(pipe)
    for start, stop, window in ((0.0, 0.25, [0]), (0.5, 0.75, [2]), (0.25, 1.0, [1, 2, 3])):
        config = SoftPAGConfig(heads="all", start=start, stop=stop)
        calls = []
        with apply_head_guidance(pipe, config):
            hook = pipe.transformer.context_embedder.register_forward_hook(lambda *a, calls=calls: calls.append(1))
            found = make(pipe, given, guidance_scale=3.0)
            hook.remove()
        torch.testing.assert_close(
            found, by_hand(pipe, given, config, scale_of_cfg=3.0, window=window), rtol=1e-4, atol=1e-4
        )
        assert len(calls) == STEPS + len(window)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_flux_with_and_without_true_cfg(tiny, cfg, steps):
    """FLUX runs CFG's passes one after the other."""
    pipe = tiny.pipeline("flux")
    model = pipe.transformer
    given = tiny.prompts(pipe)
    other = tiny.prompts(pipe, seed=5)
    if cfg > 1:
        given |= {f"negative_{key}": value for key, value in other.items()}
    start = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(2))
    config = SoftPAGConfig(heads=[(0, 0), (3, 1)], scale=2.0)
    with apply_head_guidance(pipe, config):
        runs = [make(pipe, given, steps=steps, latents=start, true_cfg_scale=cfg) for _ in range(2)]
    assert torch.equal(*runs)
    ids = [torch.zeros(64, 3), torch.zeros(6, 3)]
    ids[0][:, 1], ids[0][:, 2] = torch.arange(8).repeat_interleave(8), torch.arange(8).repeat(8)

    @torch.no_grad()
    def predict(x, t, prompts):
        return model(
            hidden_states=x, encoder_hidden_states=prompts["prompt_embeds"], timestep=t.expand(1) / 1000,
            pooled_projections=prompts["pooled_prompt_embeds"], img_ids=ids[0], txt_ids=ids[1], return_dict=False,
        )[0]  # fmt: skip

    scheduler = copy.deepcopy(pipe.scheduler)
    x = start
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    assert torch.equal(scheduler.timesteps, pipe.scheduler.timesteps)
    for t in scheduler.timesteps:
        cond = predict(x, t, given)
        with perturbed_heads(model, config):
            damaged = predict(x, t, given)
        pred = guide(cond, damaged, scale=2.0)
        if cfg > 1:
            pred = guide_with_cfg(cond, predict(x, t, other), damaged, guidance_scale=cfg, scale=2.0)
        x = scheduler.step(pred, t, x, return_dict=False)[0]
    torch.testing.assert_close(runs[0], x, rtol=1e-4, atol=1e-4)


def test_a_batch_gives_what_its_pictures_give_alone(tiny):
    pipe = tiny.pipeline("sd3")
    many = tiny.prompts(pipe, count=3)
    start = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    with apply_head_guidance(pipe, CONFIG):
        together = make(pipe, many, latents=start, guidance_scale=4.0)
        for i in range(3):
            alone = make(pipe, {k: v[i : i + 1] for k, v in many.items()}, latents=start[i : i + 1], guidance_scale=4.0)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_several_pictures_a_prompt(tiny):
    pipe = tiny.pipeline("sd15")
    given = tiny.prompts(pipe)
    start = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    with apply_head_guidance(pipe, CONFIG):
        both = make(pipe, given, latents=start, num_images_per_prompt=2)
        for i in range(2):
            torch.testing.assert_close(
                both[i : i + 1], make(pipe, given, latents=start[i : i + 1]), rtol=1e-3, atol=1e-3
            )


def test_skip_layer_guidance_of_sd3_goes_beside(tiny):
    """Its pass without some layers is left alone; both guidances add up."""
    pipe = tiny.pipeline("sd3")
    given = tiny.prompts(pipe)
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    seen = []
    with apply_head_guidance(pipe, CONFIG) as handle:
        hook = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs.get("skip_layers")), with_kwargs=True
        )
        both = make(pipe, given, steps=6, guidance_scale=4.0, **skip)
        hook.remove()
        handle.disable()
        skipping = make(pipe, given, steps=6, guidance_scale=4.0, **skip)
    assert [1] in seen
    assert not torch.allclose(both, skipping)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NumPy's, from diffusers' schedulers
@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"]
)
def test_schedulers_of_unets(tiny, name):
    import diffusers

    pipe = tiny.pipeline("sd15")
    pipe.scheduler = getattr(diffusers, name)()
    given = tiny.prompts(pipe)
    plain = make(pipe, given)
    calls = []
    with apply_head_guidance(pipe, SoftPAGConfig(heads="all", stop=0.5)):
        hook = pipe.unet.conv_in.register_forward_hook(lambda *a: calls.append(1))
        guided = make(pipe, given)
        hook.remove()
    passes = len(pipe.scheduler.timesteps)
    assert len(calls) == passes + int(0.5 * passes)
    assert torch.isfinite(guided).all()
    assert not torch.allclose(guided, plain)


def test_image_to_image(tiny):
    from diffusers import StableDiffusion3Img2ImgPipeline

    base = tiny.pipeline("sd3")
    pipe = StableDiffusion3Img2ImgPipeline(**base.components)
    pipe.set_progress_bar_config(disable=True)
    given = tiny.prompts(base)

    def go():
        return pipe(
            **given, image=torch.full((1, 3, 64, 64), 0.5), strength=0.5, num_inference_steps=4, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    plain = go()
    with apply_head_guidance(pipe, CONFIG):
        assert not torch.allclose(go(), plain)
    with apply_head_guidance(pipe, SoftPAGConfig(heads="all", stop=0.5)):  # the first half of the schedule is left out
        assert torch.equal(go(), plain)


def test_knobs_turn_while_pictures_are_made(tiny):
    pipe = tiny.pipeline("sd3")
    given = tiny.prompts(pipe)
    with apply_head_guidance(pipe, CONFIG) as handle:

        def off_after_two(pipe, step, timestep, kwargs):
            if step == 1:
                handle.set_scale(0.0)
            return kwargs

        found = make(pipe, given, guidance_scale=3.0, callback_on_step_end=off_after_two)
    half = SoftPAGConfig(heads=CONFIG.heads, scale=CONFIG.scale, stop=0.5)
    with apply_head_guidance(pipe, half):
        assert torch.equal(make(pipe, given, guidance_scale=3.0), found)


def test_a_pass_that_raises_leaves_nothing(tiny):
    pipe = tiny.pipeline("sd3")
    given = tiny.prompts(pipe)
    with apply_head_guidance(pipe, CONFIG) as handle:
        want = make(pipe, given)
        count = []

        def explode(*args):
            count.append(1)
            if len(count) == 2:  # the damaged pass of the first step
                raise RuntimeError("out of memory")

        hook = pipe.transformer.norm_out.register_forward_hook(explode)
        with pytest.raises(RuntimeError, match="out of memory"):
            make(pipe, given)
        hook.remove()
        assert handle.damage.now.first is None
        assert torch.equal(make(pipe, given), want)


def test_copies_of_the_denoiser_are_plain(tiny):
    pipe = tiny.pipeline("flux")
    given = tiny.prompts(pipe)
    plain = make(pipe, given)
    apply_head_guidance(pipe, CONFIG)
    guided = make(pipe, given)
    other = type(pipe)(**{**pipe.components, "transformer": copy.deepcopy(pipe.transformer)})
    other.set_progress_bar_config(disable=True)
    assert torch.equal(make(other, given), plain)
    assert torch.equal(make(pipe, given), guided)


def test_compiled_denoisers(tiny):
    pipe = tiny.pipeline("sd3", layers=2)
    given, config = tiny.prompts(pipe), SoftPAGConfig(heads=[(0, 0), (1, 1)])
    with apply_head_guidance(pipe, config):
        want = make(pipe, given)
    model = pipe.transformer
    torch._dynamo.reset()
    pipe.transformer = torch.compile(model, fullgraph=True, backend="eager")
    with apply_head_guidance(pipe, config):
        torch.testing.assert_close(make(pipe, given), want, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    pipe.transformer = model
    for block in model.transformer_blocks:  # regional compiling
        block.compile(fullgraph=True, backend="eager")
    with apply_head_guidance(pipe, config):
        torch.testing.assert_close(make(pipe, given), want, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled in place"):
        apply_head_guidance(pipe, config)


def test_step_caches_keep_the_damaged_pass_apart(tiny):
    from diffusers import FirstBlockCacheConfig

    pipe = tiny.pipeline("flux")
    given = tiny.prompts(pipe)
    with apply_head_guidance(pipe, CONFIG):
        want = make(pipe, given)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))  # never reuses, but keeps
    with apply_head_guidance(pipe, CONFIG):
        torch.testing.assert_close(make(pipe, given), want)


def test_what_cannot_be_guided(tiny):
    with pytest.raises(TypeError, match="has no scheduler"):
        apply_head_guidance(torch.nn.Linear(1, 1), CONFIG)
    pipe = tiny.pipeline("sd3")
    with pytest.raises(ValueError, match=r"layers with 'attn' are 0\.\.2"):
        apply_head_guidance(pipe, SoftPAGConfig(heads=[(7, 0)]))
    assert "forward" not in vars(pipe.transformer)

    class StableDiffusion3PAGPipeline(type(pipe)):
        pass

    pag = StableDiffusion3PAGPipeline(**pipe.components)
    with pytest.raises(ValueError, match="does perturbed attention guidance itself"):
        apply_head_guidance(pag, CONFIG)
