"""A layout together with guidance by heads and with a style: one step of all streams, against passes run by hand."""

import pytest
import torch
from eff_guidance.head_guidance import SoftPAGConfig, apply_head_guidance, apply_head_perturbation, perturbed_heads
from eff_guidance.layerbind import LayerBindConfig, apply_layerbind
from eff_guidance.layerbind.hosts import Host
from eff_guidance.layerbind.passes import BranchPass, NursingPass, Stream
from eff_guidance.layerbind.regions import Grid, regions_of
from eff_guidance.pokefusion import StyleAttentionConfig, add_style_attention
from eff_kernels.edit.attention import observe_attention

KINDS = ["sd3", "sd3.5", "flux"]
HEADS = SoftPAGConfig(heads=((0, 1), (2, 0)), strength=(1.0, 0.5), scale=2.0)


def guided(scene, pipe, config=None, heads=HEADS, **more):
    with (
        apply_layerbind(pipe, scene.layout, config, prompts=scene.prompts(pipe), order=1),
        apply_head_guidance(pipe, heads, order=0),
    ):
        return scene.draw(pipe, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_each_alone_is_as_before_and_none_is_plain(tiny, scene, kind):
    pipe = tiny.pipeline(kind)
    plain = scene.draw(pipe)
    with apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe)):
        layout = scene.draw(pipe)
    with apply_head_guidance(pipe, HEADS):
        heads = scene.draw(pipe)
    both = guided(scene, pipe)
    assert not any(torch.equal(both, other) for other in (plain, layout, heads))
    no_layout, no_heads = LayerBindConfig(eta1=0.0, eta2=0.0), SoftPAGConfig(heads=HEADS.heads, scale=0.0)
    assert torch.equal(guided(scene, pipe, heads=no_heads), layout)
    assert torch.equal(guided(scene, pipe, heads=SoftPAGConfig(heads=HEADS.heads, strength=0.0)), layout)
    assert torch.equal(guided(scene, pipe, no_layout), heads)
    assert torch.equal(guided(scene, pipe, no_layout, no_heads), plain)
    assert torch.equal(scene.draw(pipe), plain)
    assert torch.equal(guided(scene, pipe), both)


def step_by_hand(pipe, scene, given, *, cfg, config, heads, phase):
    """Latents after one step: the whole system of scene and branches, with its velocities guided stream by stream."""
    model, host = pipe.transformer, Host.of(pipe.transformer)
    size, batch = scene.tiny.size, 2
    noise = torch.Generator().manual_seed(3)
    prompts = scene.prompts(pipe)
    args = scene.tiny.inputs(model, count=batch)
    start = torch.randn(batch, 4, size // 4, size // 4, generator=noise)
    start = pipe._pack_latents(start, batch, 4, size // 4, size // 4) if host.flux else start
    pipe.scheduler.set_timesteps(sigmas=[1.0]) if host.flux else pipe.scheduler.set_timesteps(1)
    t = pipe.scheduler.timesteps[0]
    args |= {"hidden_states": start, "timestep": (t / 1000 if host.flux else t).expand(batch), "return_dict": False}
    regions = regions_of(scene.layout, Grid(8, 8))[:]
    tokens = host.to_tokens(model, start)

    def expand(value):
        return value[None].expand(batch, *value.shape)

    def rows(name):
        return [given[f"{name}{n}"] for n in ("prompt_embeds", "pooled_prompt_embeds")]

    def phase_one(name):
        own = name == ""
        scene_text = [expand(x) for x in prompts.background] if own else rows(name)
        streams = [
            Stream(region, tokens[:, region.idx], *([expand(x) for x in words] if own else rows(name)))
            for region, words in zip(regions, prompts.layers[::-1], strict=True)
        ]
        hard = config.blocks_of(len(host.blocks(model)), flux=host.flux) if own else frozenset()
        step = BranchPass(host, model, host.with_text(args, *scene_text), streams, hard=hard, reverse=True)
        with step.active():
            out = model(**step.args)[0]
        return [out, *(s.velocity for s in streams)]

    def phase_two(name):
        text, pooled = rows(name)
        if name:
            return [model(**host.with_text(args, text, pooled))[0]]
        words = [expand(p.tokens) for p in prompts.layers[::-1]]
        masks = [torch.ones(batch, len(r.idx), dtype=torch.bool) for r in regions]
        step = NursingPass(host, [w.shape[1] for w in words], regions, masks, config.opacity)
        with step.active():
            text = torch.cat([*words, text] if host.flux else [text, *words], 1)
            return [model(**host.with_text(args, text, pooled))[0]]

    run = phase_one if phase == 1 else phase_two
    with apply_layerbind(pipe, scene.layout, config, prompts=prompts, order=1):
        cond = run("")
        with perturbed_heads(model, heads, order=0):
            damaged = run("")
        uncond = run("negative_") if cfg > 1 else cond
    moved = [n + cfg * (c - n) + heads.scale * (c - d) for n, c, d in zip(uncond, cond, damaged, strict=True)]
    change = pipe.scheduler.sigmas[1] - pipe.scheduler.sigmas[0]
    latents = host.to_tokens(model, start + change * moved[0])
    for region, velocity in zip(regions if phase == 1 else (), moved[1:], strict=True):  # pasted back to front
        latents[:, region.idx] = tokens[:, region.idx] + change * velocity
    return host.from_tokens(model, latents, Grid(8, 8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_all_streams_are_guided(tiny, scene, kind, phase, cfg):
    pipe = tiny.pipeline(kind)
    flux = kind == "flux"
    given = tiny.prompts(pipe, count=2)
    if flux:  # its pipeline makes negative prompts a pass of their own
        other = tiny.prompts(pipe, count=2, seed=8)
        given |= {f"negative_{name}": value for name, value in other.items()}
    config = LayerBindConfig(eta1=1.0 if phase == 1 else 0.0, eta2=1.0, alpha_mode="direct", hard_blocks=(1,))
    wanted = step_by_hand(pipe, scene, given, cfg=cfg, config=config, heads=HEADS, phase=phase)
    scale = {"true_cfg_scale": cfg} if flux else {"guidance_scale": cfg}
    if flux and cfg == 1:
        given = {name: value for name, value in given.items() if not name.startswith("negative")}
    call = {"num_inference_steps": 1, **given, **scale}
    if flux:
        call["sigmas"] = [1.0]
    with (
        apply_layerbind(pipe, scene.layout, config, prompts=scene.prompts(pipe), order=1),
        apply_head_guidance(pipe, HEADS, order=0),
    ):
        found = pipe(
            height=tiny.size, width=tiny.size, generator=torch.Generator().manual_seed(3), output_type="latent", **call
        ).images
    assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    with apply_layerbind(pipe, scene.layout, config, prompts=scene.prompts(pipe)):
        without = pipe(
            height=tiny.size, width=tiny.size, generator=torch.Generator().manual_seed(3), output_type="latent", **call
        ).images
    assert (without - wanted).norm() > 1e-3 * wanted.norm()


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_damage_outside_is_damage_of_each_part(tiny, scene, kind):
    """``(1 - u) A + u I`` in every contextual attention, composited afterwards, with maps written out in float64."""
    pipe = tiny.pipeline(kind)
    model, host = pipe.transformer, Host.of(pipe.transformer)
    args = {**tiny.inputs(model, count=1), "return_dict": False}
    regions, strength, head = regions_of(scene.layout, Grid(8, 8)), 0.3, 1
    words = [torch.randn(1, n, 32, generator=torch.Generator().manual_seed(n)) for n in (4, 7)]
    text = torch.cat(
        [*words, args["encoder_hidden_states"]] if host.flux else [args["encoder_hidden_states"], *words], 1
    )
    masks = [torch.ones(1, len(r.idx), dtype=torch.bool) for r in regions]
    seen = []
    with (
        apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe), order=1),
        apply_head_perturbation(model, SoftPAGConfig(heads=((0, head),), strength=strength), order=0),
        observe_attention(model, lambda call, output: seen.append((call, output.out)), order=-1),
        NursingPass(host, (4, 7), regions, masks, 0.7).active(),
    ):
        model(**host.with_text(args, text, args["pooled_projections"]))
    call, out = seen[0]
    picture = call.streams["image"]
    start = call.streams["text"].start
    at = 0 if host.flux else start + 6
    parts = {"back": range(at, at + 4), "front": range(at + 4, at + 11)}
    scene_words = range(11, 17) if host.flux else range(start, start + 6)
    q, k, v = (x[:, head].double() for x in (call.q, call.k, call.v))

    def damaged(ask, see):
        weights = (q[:, ask] @ k[:, see].mT / q.shape[-1] ** 0.5).softmax(-1)
        own = torch.tensor([[float(a == s) for s in see] for a in ask], dtype=torch.float64)
        return ((1 - strength) * weights + strength * own) @ v[:, see]

    image = list(range(picture.start, picture.stop))
    wanted = damaged(image, [*scene_words, *image])
    for name, region in zip(("back", "front"), regions, strict=True):
        ask = [image[i] for i in region.idx.tolist()]
        local = damaged(ask, [*parts[name], *image])
        wanted[:, region.idx] = 0.3 * wanted[:, region.idx] + 0.7 * local
    found = out[:, head, picture]
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_a_window_guides_its_steps_alone(tiny, scene):
    pipe = tiny.pipeline("sd3")
    half = SoftPAGConfig(heads=HEADS.heads, scale=2.0, start=0.5, stop=1.0)
    seen = {}

    def look(name):
        def callback(pipe, step, t, given):
            seen.setdefault(name, []).append(given["latents"].clone())
            return {}

        return callback

    guided(scene, pipe, heads=half, callback_on_step_end=look("half"))
    with apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe)):
        scene.draw(pipe, callback_on_step_end=look("none"))
    same = [torch.equal(a, b) for a, b in zip(seen["half"], seen["none"], strict=True)]
    assert same == [True, True, False, False]


def test_a_batch_and_lora_and_int8_beside_both(tiny, scene):
    peft, quant = pytest.importorskip("peft"), pytest.importorskip("eff_quant")
    pipe = tiny.pipeline("sd3")
    both = guided(scene, pipe)
    torch.manual_seed(0)
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    assert not torch.allclose(guided(scene, pipe), both, rtol=1e-3)
    pipe.transformer.disable_adapters()
    assert (guided(scene, pipe) - both).norm() <= 1e-5 * both.norm()
    pipe = tiny.pipeline("sd3")
    quant.quantize_(pipe.transformer, quant.Int8Config())
    assert 0 < (guided(scene, pipe) - both).norm() <= 0.2 * both.norm()


def test_what_has_no_meaning_is_refused(tiny, scene):
    pipe = tiny.pipeline("sd3")
    with pytest.raises(ValueError, match=r"target='uniform'.*with a layout"):
        guided(scene, pipe, heads=SoftPAGConfig(heads=HEADS.heads, target="uniform"))
    with pytest.raises(ValueError, match="path='slerp'"):
        guided(scene, pipe, heads=SoftPAGConfig(heads=HEADS.heads, path="slerp"))
    prompts = scene.prompts(pipe)
    with apply_layerbind(pipe, scene.layout, prompts=prompts, order=1):
        with apply_head_guidance(pipe, HEADS, order=0, batched=True), pytest.raises(ValueError, match="batched=False"):
            scene.draw(pipe)
        with apply_head_guidance(pipe, HEADS, order=2), pytest.raises(ValueError, match="order below the layout's"):
            scene.draw(pipe)
    with (
        apply_head_guidance(pipe, HEADS, order=0),
        pytest.raises(ValueError, match="put the layout on first"),
    ):
        apply_layerbind(pipe, scene.layout, prompts=prompts, order=1)
    plain = scene.draw(pipe)
    assert torch.isfinite(plain).all()


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_style_goes_to_rows_with_prompt_alone(tiny, scene, kind, monkeypatch):
    """In branches, which are a batch of their own, and in the damaged pass, which has no rows without prompt."""
    from eff_guidance.pokefusion import use as module

    pipe = tiny.pipeline(kind)
    rows = []
    real = module.style_attention

    def look(adapter, name, attention, q, use, factor):
        out = real(adapter, name, attention, q, use, factor)
        rows.append([bool(row.any()) for row in out])
        return out

    monkeypatch.setattr("eff_guidance.pokefusion.rule.style_attention", look)
    style = add_style_attention(pipe, StyleAttentionConfig(gate_init=0.5), order=-1)
    given = tiny.prompts(pipe, count=2)
    with (
        style.use(),
        apply_layerbind(
            pipe, scene.layout, LayerBindConfig(hard_blocks=(1,)), prompts=scene.prompts(pipe, tokens=(6,) * 3), order=1
        ),
        apply_head_guidance(pipe, HEADS, order=0),
    ):
        scene.draw(pipe, count=2, num_inference_steps=2, **given)
    off, on = [False] * 2, [True] * 2
    if kind == "sd3":
        assert {tuple(r) for r in rows} == {(*off, *on), (*off, *on) * 2, tuple(off * 2), tuple(on), tuple(on * 2)}
    else:
        assert {tuple(r) for r in rows} == {tuple(on)}
    bound = apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe), order=1)
    with style.use(mask=torch.ones(8, 8)), bound, pytest.raises(ValueError, match="style's mask"):
        scene.draw(pipe)


def test_joint_styles_are_refused_in_a_layout(tiny, scene):
    pipe = tiny.pipeline("sd3")
    style = add_style_attention(pipe, StyleAttentionConfig(gate_init=0.5, fusion="joint"), order=-1)
    with style.use():
        scene.draw(pipe)
        bound = apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe), order=1)
        with bound, pytest.raises(ValueError, match="fusion='joint'"):
            scene.draw(pipe)


def test_styles_that_read_the_text_act_in_branches(tiny, scene):
    """Of one size, so that they are one batch with twice the rows of the text with a prompt."""
    pipe = tiny.pipeline("sd3")
    config = StyleAttentionConfig(gate_init=0.5, text_modulated=True)
    style = add_style_attention(pipe, config, order=-1)
    given = tiny.prompts(pipe, count=2)
    bound = apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe, tokens=(6,) * 3), order=1)
    with bound:
        plain = scene.draw(pipe, count=2, **given)
        with style.use():
            styled = scene.draw(pipe, count=2, **given)
    assert torch.isfinite(styled).all()
    assert not torch.allclose(styled, plain, rtol=1e-3)


def test_two_scale_guidance_is_refused_in_a_layout(tiny, scene):
    """Its second pass would run the branches again, or be taken for that without a prompt."""
    pipe = tiny.pipeline("sd3")
    prompts = scene.prompts(pipe)
    with add_style_attention(pipe, StyleAttentionConfig(gate_init=0.5), order=-1) as style:
        bound = apply_layerbind(pipe, scene.layout, prompts=prompts, order=1)
        with style.use(guidance_ratio=2.0), bound, pytest.raises(ValueError, match=r"ratio=2\.0.*layout"):
            scene.draw(pipe)
    with (
        apply_layerbind(pipe, scene.layout, prompts=prompts, order=1),
        add_style_attention(pipe, StyleAttentionConfig(gate_init=0.5), order=-1) as style,
        style.use(guidance_ratio=2.0),
        pytest.raises(RuntimeError, match="ran more often"),
    ):
        scene.draw(pipe)
