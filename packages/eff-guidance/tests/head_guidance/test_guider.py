"""SoftPAG as a guider of diffusers."""

import copy
import gc
import json

import pytest
import torch
from eff_guidance.head_guidance import (
    SoftPAGConfig,
    apply_head_guidance,
    guide_with_cfg,
    heads_of_layers,
    perturbed_heads,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def guidance():
    from eff_guidance.head_guidance import SoftPAGGuidance

    return SoftPAGGuidance


def step(guider, model, given, prompts, i=0, steps=4):
    """One step as the denoise block of a modular pipeline makes it."""
    guider.set_state(step=i, num_inference_steps=steps, timestep=torch.tensor(500.0))
    batches = guider.prepare_inputs(prompts)
    for batch in batches:
        guider.prepare_models(model)
        with torch.no_grad():
            own = {name: getattr(batch, name) for name in prompts}
            batch.noise_pred = model(**{**given, **own}, return_dict=False)[0]
        guider.cleanup_models(model)
    return guider(batches).pred


def both(tiny, model):
    given, other = tiny.inputs(model, seed=0), tiny.inputs(model, seed=1)
    names = [n for n in ("encoder_hidden_states", "pooled_projections") if n in given]
    return given, {n: (given[n], other[n]) for n in names}


@torch.no_grad()
def predictions(model, given, prompts, config):
    calls = [{**given, **{n: pair[i] for n, pair in prompts.items()}} for i in (0, 1)]
    cond, uncond = (model(**call, return_dict=False)[0] for call in calls)
    with perturbed_heads(model, config):
        damaged = model(**calls[0], return_dict=False)[0]
    return cond, uncond, damaged


@pytest.mark.parametrize("kind", ["sd3", "sd3.5", "flux", "sd15"])
def test_formula_with_and_without_cfg(tiny, guidance, kind):
    model = tiny.model(kind)
    given, prompts = both(tiny, model)
    heads = [(0, 0), (2, 1)]
    cond, uncond, damaged = predictions(model, given, prompts, SoftPAGConfig(heads=heads, strength=0.5))
    guider = guidance(heads=heads, scale=2.0, strength=0.5, guidance_scale=4.0)
    found = step(guider, model, given, prompts)
    torch.testing.assert_close(found, uncond + 4 * (cond - uncond) + 2 * (cond - damaged))
    original = guider.new(use_original_formulation=True)
    found = step(original, model, given, prompts)
    torch.testing.assert_close(found, cond + 4 * (cond - uncond) + 2 * (cond - damaged))
    found = step(guider.new(guidance_scale=1.0), model, given, prompts)
    torch.testing.assert_close(found, cond + 2 * (cond - damaged))
    assert torch.equal(step(guider.new(guidance_scale=1.0, scale=0.0), model, given, prompts), cond)
    assert torch.equal(step(guider.new(guidance_scale=1.0, strength=0.0), model, given, prompts), cond)
    assert torch.equal(step(guider.new(enabled=False), model, given, prompts), cond)


def test_passes_of_a_step(tiny, guidance):
    model = tiny.model("sd3")
    given, prompts = both(tiny, model)
    guider = guidance(heads="all", perturbation_start=0.25, perturbation_stop=0.75, stop=0.5)
    counts = []
    for i in range(4):
        step(guider, model, given, prompts, i=i)
        counts.append(guider.num_conditions)
    assert counts == [2, 3, 2, 1]
    assert guider.is_conditional


def test_stock_pag_of_a_unet(tiny, guidance):
    """diffusers' PAG of a layer is all its heads at strength 1, with the same scale beside CFG."""
    from diffusers import PerturbedAttentionGuidance
    from diffusers.hooks import LayerSkipConfig

    model = tiny.model("sd15")
    given, prompts = both(tiny, model)
    where = "mid_block.attentions.0.transformer_blocks"
    layer = LayerSkipConfig(indices=[0], fqn=where, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    stock = PerturbedAttentionGuidance(
        guidance_scale=4.0, perturbed_guidance_scale=3.0, perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0,
        perturbed_guidance_config=layer,
    )  # fmt: skip
    own = guidance(heads=heads_of_layers(model, 1), scale=3.0, guidance_scale=4.0)
    torch.testing.assert_close(step(own, model, given, prompts, i=1), step(stock, model, given, prompts, i=1))


def test_the_scale_of_stock_pag_without_cfg_is_one_more(guidance):
    """Its formula is d + s (c - d), hence s = w + 1. Whether its second pass is damaged at all is another matter."""
    from diffusers import PerturbedAttentionGuidance

    cond, damaged = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    stock = PerturbedAttentionGuidance(
        guidance_scale=1.0, perturbed_guidance_scale=3.5, perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0,
        perturbed_guidance_layers=[0],
    )  # fmt: skip
    want = stock.forward(pred_cond=cond, pred_cond_skip=damaged).pred
    own = guidance(heads="all", scale=2.5, guidance_scale=1.0)
    torch.testing.assert_close(own.forward(pred_cond=cond, pred_cond_perturbed=damaged).pred, want)


def test_stock_pag_of_sd3_is_image_identity(tiny):
    """The legacy SD3-PAG processor masks the image block but for its diagonal."""
    from diffusers.models.attention_processor import PAGJointAttnProcessor2_0

    model = tiny.model("sd3")
    given = tiny.inputs(model, count=1)
    twice = {k: torch.cat([v, v]) for k, v in given.items()}
    with torch.no_grad():
        model.transformer_blocks[1].attn.set_processor(PAGJointAttnProcessor2_0())  # second half of a batch
        want = model(**twice, return_dict=False)[0][1:]
        model.transformer_blocks[1].attn.set_processor(type(model.transformer_blocks[0].attn.processor)())
        config = SoftPAGConfig(heads=heads_of_layers(model, 1), target="image_identity")
        with perturbed_heads(model, config):
            found = model(**given, return_dict=False)[0]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_guider_and_pipeline_agree(tiny, guidance):
    model = tiny.pipeline("sd3").transformer
    pipe = tiny.pipeline("sd3")
    given = tiny.prompts(pipe)
    heads = [(0, 1), (1, 0)]
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with apply_head_guidance(pipe, SoftPAGConfig(heads=heads, scale=2.0)):
        want = pipe(
            **given, latents=start, height=64, width=64, num_inference_steps=3, guidance_scale=4.0, output_type="latent"
        ).images
    guider = guidance(heads=heads, scale=2.0, guidance_scale=4.0)
    prompts = {
        "encoder_hidden_states": (given["prompt_embeds"], given["negative_prompt_embeds"]),
        "pooled_projections": (given["pooled_prompt_embeds"], given["negative_pooled_prompt_embeds"]),
    }
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(3)
    x = start
    for i, t in enumerate(scheduler.timesteps):
        pred = step(guider, model, {"hidden_states": x, "timestep": t.expand(1)}, prompts, i=i, steps=3)
        x = scheduler.step(pred, t, x, return_dict=False)[0]
    torch.testing.assert_close(x, want, rtol=1e-4, atol=1e-4)


def test_nothing_is_left_behind(tiny, guidance):
    model = tiny.model("sd3")
    given, prompts = both(tiny, model)
    plain = model(**given, return_dict=False)[0]
    guider = guidance(heads="all")
    step(guider, model, given, prompts)
    assert torch.equal(model(**given, return_dict=False)[0], plain)
    # A pass that raises: the next one is whole.
    guider.set_state(0, 4, None)
    guider.prepare_inputs(prompts)
    for _ in range(3):
        guider.prepare_models(model)
    with pytest.raises(RuntimeError):
        model(**{**given, "hidden_states": given["hidden_states"][:, :1]})
    assert torch.equal(model(**given, return_dict=False)[0], plain)
    guider.release()
    assert "forward" not in vars(model)
    assert all("forward" not in vars(m) for m in model.modules())
    step(guider, model, given, prompts)
    assert "forward" in vars(model)
    del guider
    gc.collect()
    assert all("forward" not in vars(m) for m in model.modules())


def test_two_guiders_and_two_models(tiny, guidance):
    models = [tiny.model("sd3", seed=s) for s in (0, 1)]
    guiders = [guidance(heads=[(0, 0)], scale=2.0), guidance(heads=[(1, 1)], scale=1.0)]
    given, prompts = both(tiny, models[0])
    want = [
        [step(guidance(heads=g.settings.heads, scale=g.settings.scale), m, given, prompts) for g in guiders]
        for m in models
    ]
    for _ in range(2):
        found = [[step(g, m, given, prompts) for g in guiders] for m in models]
        assert all(torch.equal(a, b) for x, y in zip(found, want, strict=True) for a, b in zip(x, y, strict=True))


def test_no_graph_a_step(tiny, guidance):
    model = tiny.model("sd3", layers=1)
    given, prompts = both(tiny, model)
    want = step(guidance(heads=[(0, 0)]), model, given, prompts)
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    guider = guidance(heads=[(0, 0)])
    for i in range(4):
        found = step(guider, compiled, given, prompts, i=i)
        torch.testing.assert_close(found, want)
    assert len(graphs) <= 3  # untouched, with the rule asleep, with the rule at work
    torch._dynamo.reset()


def test_saves_and_copies(tiny, guidance, tmp_path):
    model = tiny.model("sd3")
    given, prompts = both(tiny, model)
    guider = guidance(heads=[(0, 1), (1, 0)], strength=(0.5, 1.0), scale=2.0, target="uniform")
    want = step(guider, model, given, prompts)
    guider.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "guider_config.json").read_text())["scale"] == 2.0
    for other in (guidance.from_pretrained(tmp_path), copy.deepcopy(guider), guider.new()):
        assert torch.equal(step(other, model, given, prompts), want)


def test_rescaling(tiny, guidance):
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    model = tiny.model("sd3")
    given, prompts = both(tiny, model)
    plain = guidance(heads="all", scale=3.0)
    whole = step(plain, model, given, prompts)
    found = step(plain.new(guidance_rescale=0.5), model, given, prompts)
    cond = predictions(model, given, prompts, SoftPAGConfig(heads=[]))[0]
    torch.testing.assert_close(found, rescale_noise_cfg(whole, cond, 0.5))


def test_bad_settings(guidance):
    with pytest.raises(ValueError, match=r"strength=2\.0; use 0 to 1"):
        guidance(heads="all", strength=2.0)
    with pytest.raises(ValueError, match=r"start=0\.5, stop=0\.2"):
        guidance(heads="all", perturbation_start=0.5, perturbation_stop=0.2)


def test_a_modular_pipeline_of_sd3(tiny, guidance):
    """The denoising blocks of diffusers' modular SD3 with this guider give what the guided ordinary pipeline gives."""
    from diffusers.modular_pipelines.stable_diffusion_3.denoise import StableDiffusion3DenoiseStep

    pipe = tiny.pipeline("sd3")
    given = tiny.prompts(pipe)
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {"heads": [(0, 1), (2, 0)], "scale": 2.0, "strength": 0.7}
    call = {"height": 64, "width": 64, "output_type": "latent", "num_inference_steps": 3, "guidance_scale": 4.0}
    with apply_head_guidance(pipe, SoftPAGConfig(**settings)):
        want = pipe(**given, latents=start, **call).images
    blocks = StableDiffusion3DenoiseStep().init_pipeline()
    blocks.set_progress_bar_config(disable=True)
    guider = guidance(guidance_scale=4.0, **settings)
    blocks.update_components(guider=guider, transformer=pipe.transformer, scheduler=pipe.scheduler)
    pipe.scheduler.set_timesteps(3)
    found = blocks(**given, latents=start, timesteps=pipe.scheduler.timesteps, num_inference_steps=3, output="latents")
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_a_modular_pipeline_of_sdxl(tiny, guidance):
    """The denoising blocks of diffusers' modular SDXL with this guider against a loop by hand."""
    from diffusers import EulerDiscreteScheduler
    from diffusers.modular_pipelines.modular_pipeline import PipelineState
    from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep

    model, scheduler = tiny.model("sdxl"), EulerDiscreteScheduler()
    settings = {"heads": [(0, 1), (2, 0)], "scale": 2.0, "strength": 0.7}
    scheduler.set_timesteps(3)
    gen = torch.Generator().manual_seed(0)
    start = torch.randn(1, 4, 16, 16, generator=gen) * scheduler.init_noise_sigma
    fields = {
        f"{negative}{name}": torch.randn(1, *shape, generator=gen)
        for negative in ("", "negative_")
        for name, shape in (("prompt_embeds", (6, 32)), ("pooled_prompt_embeds", (32,)), ("add_time_ids", (6,)))
    }

    def predict(x, t, negative=""):
        added = {
            "text_embeds": fields[f"{negative}pooled_prompt_embeds"],
            "time_ids": fields[f"{negative}add_time_ids"],
        }
        text = fields[f"{negative}prompt_embeds"]
        return model(x, t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]

    want = start
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.scale_model_input(want, t)
            with perturbed_heads(model, SoftPAGConfig(**settings)):
                damaged = predict(x, t)
            cond, uncond = predict(x, t), predict(x, t, "negative_")
            pred = guide_with_cfg(cond, uncond, damaged, guidance_scale=4.0, scale=2.0)
            want = scheduler.step(pred, t, want, return_dict=False)[0]
    scheduler.set_timesteps(3)
    pipe = StableDiffusionXLDenoiseStep().init_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.update_components(guider=guidance(guidance_scale=4.0, **settings), unet=model, scheduler=scheduler)
    state = PipelineState()
    for name, value in fields.items():
        state.set(name, value, "denoiser_input_fields")
    found = pipe(state, latents=start, timesteps=scheduler.timesteps, num_inference_steps=3, eta=0.0, output="latents")
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
