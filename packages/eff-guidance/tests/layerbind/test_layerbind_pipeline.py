"""Whole pipelines: undo, phases, batches, guidance, editing, errors."""

import copy
import dataclasses
import pickle
import threading

import pytest
import torch
from eff_guidance.layerbind import (
    Layer,
    LayerBindConfig,
    Layout,
    LayoutPrompts,
    apply_layerbind,
    layerbind_generate,
    passes,
)

KINDS = ["sd3", "sd3.5", "flux"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_changes_pictures_and_is_undone(tiny, scene, kind):
    pipe = tiny.pipeline(kind)
    plain, kinds = scene.draw(pipe), type(pipe)
    handle = apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe))
    changed = scene.draw(pipe)
    assert isinstance(pipe, kinds)
    assert changed.isfinite().all()
    assert not torch.allclose(changed, plain, atol=1e-4)
    assert torch.equal(scene.draw(pipe), changed)
    handle.remove()
    handle.remove()
    assert type(pipe) is kinds
    assert torch.equal(scene.draw(pipe), plain)
    for module in pipe.transformer.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["no layers", "no steps"])
def test_nothing_to_do_is_bit_identical(tiny, scene, kind, way):
    pipe = tiny.pipeline(kind)
    plain = scene.draw(pipe)
    layout, config = (Layout(), None) if way == "no layers" else (scene.layout, LayerBindConfig(eta1=0, eta2=0))
    with apply_layerbind(pipe, layout, config, prompts=scene.prompts(pipe, len(layout.layers))):
        assert torch.equal(scene.draw(pipe), plain)


def test_the_transformer_alone_stays_as_it_is(tiny, scene):
    pipe = tiny.pipeline("flux")
    given = tiny.inputs(pipe.transformer)
    plain = pipe.transformer(**given).sample
    with apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe)):
        assert torch.equal(pipe.transformer(**given).sample, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_phases_switch_where_they_should(tiny, scene, kind, monkeypatch):
    pipe, seen = tiny.pipeline(kind), []
    for name in ("BranchPass", "NursingPass"):
        own = getattr(passes, name)

        def noted(*args, _own=own, **kwargs):
            seen.append((step[0], _own.__name__))
            return _own(*args, **kwargs)

        monkeypatch.setattr(f"eff_guidance.layerbind.run.{name}", noted)
    step = [0]

    def count(pipe, i, t, given):
        step[0] = i + 1
        return given

    config = LayerBindConfig(eta1=0.2, eta2=0.7, hard_blocks=(0,))
    with apply_layerbind(pipe, scene.layout, config, prompts=scene.prompts(pipe)):
        scene.draw(pipe, num_inference_steps=50, callback_on_step_end=count)
    assert {s for s, n in seen if n == "BranchPass"} == set(range(10))
    assert {s for s, n in seen if n == "NursingPass"} == set(range(10, 35))


@pytest.mark.parametrize("kind", KINDS)
def test_each_picture_of_a_batch_is_its_own(tiny, scene, kind):
    pipe = tiny.pipeline(kind)
    with apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe)):
        given = tiny.prompts(pipe, count=2)
        size = {"height": tiny.size, "width": tiny.size, "output_type": "latent", "num_inference_steps": 4}

        def draw(given, seeds):
            return pipe(**given, **size, generator=[torch.Generator().manual_seed(s) for s in seeds]).images

        both = draw(given, (4, 5))
        for i, seed in enumerate((4, 5)):
            alone = draw({k: v[i : i + 1] for k, v in given.items()}, (seed,))
            assert (alone[0] - both[i]).norm() <= 1e-4 * alone.norm()
        if kind != "flux":
            return  # SD3's pipeline repeats no given embeddings
        first = {k: v[:1] for k, v in given.items()}
        several = draw({**first, "num_images_per_prompt": 2}, (4, 5))
        assert (several[0] - both[0]).norm() <= 1e-4 * both[0].norm()


@pytest.mark.parametrize("kind", ["sd3", "sd3.5"])
@pytest.mark.parametrize("blocks", [(), (0, 2), (0, 1, 2)])
def test_rows_with_and_without_prompt_may_run_apart(tiny, scene, kind, blocks, monkeypatch):
    pipe, config = tiny.pipeline(kind), LayerBindConfig(hard_blocks=blocks, eta1=0.5)
    prompts = scene.prompts(pipe, tokens=(6, 6, 6))
    with apply_layerbind(pipe, scene.layout, config, prompts=prompts):
        together = scene.draw(pipe, count=2)
        monkeypatch.setattr("eff_guidance.layerbind.run.Run._one_length", lambda run, length: False)
        apart = scene.draw(pipe, count=2)
    assert (together - apart).norm() <= 1e-5 * apart.norm()


def test_without_guidance_only_the_prompt_runs(tiny, scene):
    pipe = tiny.pipeline("sd3")
    with apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe)):
        found = scene.draw(pipe, guidance_scale=1.0)
        other = scene.draw(pipe, guidance_scale=1.0, negative_prompt_embeds=torch.zeros(1, 6, 32))
        assert torch.equal(found, other)
        assert not torch.equal(scene.draw(pipe, guidance_scale=5.0), found)


def test_true_guidance_of_flux(tiny, scene):
    pipe = tiny.pipeline("flux")
    negative = {
        "negative_prompt_embeds": torch.zeros(1, 6, 32), "negative_pooled_prompt_embeds": torch.zeros(1, 32),
    }  # fmt: skip
    with apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe)):
        plain = scene.draw(pipe)
        assert torch.equal(scene.draw(pipe, true_cfg_scale=1.0, **negative), plain)
        near = scene.draw(pipe, true_cfg_scale=1.0001, **negative)
        assert (near - plain).norm() < 1e-2 * plain.norm()
        far = scene.draw(pipe, true_cfg_scale=4.0, **negative)
        assert (far - plain).norm() > 10 * (near - plain).norm()


def test_guidance_embedding_of_flux(tiny, scene):
    pipe = tiny.pipeline("flux", guidance=True)
    with apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe)):
        assert not torch.equal(scene.draw(pipe, guidance_scale=1.0), scene.draw(pipe, guidance_scale=9.0))


def test_negative_prompts_of_layers_matter(tiny, scene):
    pipe = tiny.pipeline("sd3")
    prompts = scene.prompts(pipe)
    with apply_layerbind(pipe, scene.layout, prompts=prompts):
        plain = scene.draw(pipe)
    other = LayoutPrompts(prompts.background, prompts.layers, [None, scene.prompts(pipe, seed=7).layers[0]])
    with apply_layerbind(pipe, scene.layout, prompts=other):
        assert not torch.equal(scene.draw(pipe), plain)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_pooled_prompts_of_layers_matter(tiny, scene, kind):
    pipe = tiny.pipeline(kind)
    prompts = scene.prompts(pipe)
    found = {}
    for own in (True, False):
        for other in (True, False):
            now = (
                prompts
                if not other
                else prompts._replace(layers=[p._replace(pooled=-p.pooled) for p in prompts.layers])
            )
            with apply_layerbind(pipe, scene.layout, LayerBindConfig(own_pooled=own), prompts=now):
                found[own, other] = scene.draw(pipe)
    assert not torch.equal(found[True, True], found[True, False])
    assert torch.equal(found[False, True], found[False, False])


def test_callbacks_of_the_caller_run(tiny, scene):
    pipe, seen = tiny.pipeline("sd3"), []

    def watch(pipe, step, t, given):
        seen.append((step, sorted(given)))
        return {"latents": given["latents"] * 0} if step == 3 and "latents" in given else {}

    with apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe)):
        out = scene.draw(pipe, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["latents"])
        assert not out.any()
        scene.draw(pipe, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert [s for s, _ in seen] == [0, 1, 2, 3] * 2
    assert seen[0][1] == ["latents"]
    assert seen[4][1] == ["prompt_embeds"]


def test_own_latents_and_sigmas(tiny, scene):
    """A given picture is edited by starting from its noised latents."""
    pipe = tiny.pipeline("sd3")
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe)):
        found = scene.draw(pipe, latents=latents, sigmas=[0.6, 0.5, 0.3, 0.1], num_inference_steps=4)
        other = scene.draw(pipe, latents=latents * 0.5, sigmas=[0.6, 0.5, 0.3, 0.1], num_inference_steps=4)
    assert found.isfinite().all()
    assert not torch.equal(found, other)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_copies_and_pickles_draw_the_same(tiny, scene, kind):
    pipe = tiny.pipeline(kind)
    plain = scene.draw(pipe)
    handle = apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe))
    wanted = scene.draw(pipe)
    twins = [copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))]
    handle.remove()
    assert torch.equal(scene.draw(pipe), plain)
    for twin in twins:
        assert torch.equal(scene.draw(twin), wanted)


def test_two_threads_with_one_transformer(tiny, scene):
    pipe = tiny.pipeline("sd3")
    other = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    other.set_progress_bar_config(disable=True)
    plain = scene.draw(other)
    found, errors = [], []
    with apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe)):
        wanted = scene.draw(pipe)

        def work(own, goal):
            try:
                found.append(torch.equal(scene.draw(own), goal))
            except Exception as error:
                errors.append(error)

        for _ in range(2):
            threads = [threading.Thread(target=work, args=pair) for pair in ((pipe, wanted), (other, plain))]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
    assert not errors
    assert found == [True] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_reordering_gives_what_a_new_picture_gives(tiny, scene, kind):
    pipe = tiny.pipeline(kind)
    prompts, config = scene.prompts(pipe), LayerBindConfig(reverse_adaptation=False, eta1=0.5, alpha_mode="direct")
    call = {**tiny.prompts(pipe), "height": 64, "width": 64, "output_type": "latent", "num_inference_steps": 4}
    new = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    images, state = layerbind_generate(pipe, scene.layout, config, prompts=prompts, generator=new(), **call)
    again, turned = state.reorder([1, 0])
    assert not torch.equal(again, images)
    fresh, _ = layerbind_generate(
        pipe, scene.layout.reorder([1, 0]), config, generator=new(),
        prompts=LayoutPrompts(prompts.background, prompts.layers[::-1]), **call,
    )  # fmt: skip
    assert (again - fresh).norm() <= 1e-5 * fresh.norm()
    assert torch.equal(turned.branches[0], state.branches[1])
    back, _ = turned.reorder([1, 0])
    assert (back - images).norm() <= 1e-5 * images.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_editing_a_layer_gives_what_a_new_picture_gives(tiny, scene, kind, monkeypatch):
    pipe = tiny.pipeline(kind)
    first, second = scene.prompts(pipe), scene.prompts(pipe, seed=8)
    changed = LayoutPrompts(first.background, [first.layers[0], second.layers[1]])
    known = {"a bee": first.layers[0], "a mouse": first.layers[1], "a cat": second.layers[1]}
    monkeypatch.setattr(
        "eff_guidance.layerbind.apply.encode_layout",
        lambda pipe, layout: LayoutPrompts(first.background, [known[x.prompt] for x in layout.layers]),
    )
    config = LayerBindConfig(reverse_adaptation=False, eta1=0.5)
    call = {**tiny.prompts(pipe), "height": 64, "width": 64, "output_type": "latent", "num_inference_steps": 4}
    new = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    _, state = layerbind_generate(pipe, scene.layout, config, generator=new(), **call)
    edited, later = state.edit(layer=1, prompt="a cat")
    fresh, other = layerbind_generate(pipe, scene.layout, config, prompts=changed, generator=new(), **call)
    assert (edited - fresh).norm() <= 1e-5 * fresh.norm()
    assert torch.equal(later.branches[0], state.branches[0])
    assert torch.allclose(later.branches[1], other.branches[1], atol=1e-5)
    assert later.layout.layers[1].prompt == "a cat"
    with pytest.raises(ValueError, match=r"edit changes prompt and negative, not .'box'."):
        state.edit(layer=1, box=(0, 0, 1, 1))


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_the_state_shows_where_the_second_phase_began(tiny, scene, kind):
    pipe = tiny.pipeline(kind)
    _, state = layerbind_generate(
        pipe, scene.layout, prompts=scene.prompts(pipe), **tiny.prompts(pipe), height=64, width=64,
        num_inference_steps=4, output_type="latent",
    )  # fmt: skip
    (picture,) = state.preview()
    assert picture.size == (64, 64)
    assert len(state.background) == 2
    assert [m.shape for m in state.masks] == [a.shape for a in state.alphas]


def test_half_precision(tiny, scene):
    pipe = tiny.pipeline("sd3")
    prompts = scene.prompts(pipe)
    with apply_layerbind(pipe, scene.layout, prompts=prompts):
        wanted = scene.draw(pipe)
    pipe.to(torch.bfloat16)
    given = {k: v.bfloat16() for k, v in tiny.prompts(pipe).items()}
    with apply_layerbind(pipe, scene.layout, prompts=prompts):
        found = scene.draw(pipe, **given)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).norm() < 0.05 * wanted.norm()


def refused(pipe, scene, words, error=ValueError, config=None, **call):
    with apply_layerbind(pipe, scene.layout, config, prompts=scene.prompts(pipe)), pytest.raises(error, match=words):
        scene.draw(pipe, **call)


def test_what_does_not_go_together_is_refused(tiny, scene):
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

    refused(tiny.pipeline("sd3"), scene, "skip_guidance_layers", skip_guidance_layers=[0])
    refused(tiny.pipeline("flux"), scene, "ip_adapter_image_embeds", ip_adapter_image_embeds=[torch.ones(1, 1, 8)])
    pipe = tiny.pipeline("sd3")
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    refused(pipe, scene, "FlowMatchHeunDiscreteScheduler, use FlowMatchEuler", TypeError)
    with apply_layerbind(pipe, scene.layout, LayerBindConfig(eta1=0), prompts=scene.prompts(pipe)):
        assert scene.draw(pipe).isfinite().all()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    refused(pipe, scene, "stochastic_sampling", TypeError)


def test_other_pipelines_are_refused(tiny, scene):
    for kind in ("sd15", "flux-fill"):
        pipe = tiny.pipeline(kind)
        with pytest.raises(TypeError, match="StableDiffusion3Pipeline, FluxPipeline and"):
            apply_layerbind(pipe, scene.layout)


def test_prompts_must_fit(tiny, scene):
    pipe = tiny.pipeline("sd3")
    with pytest.raises(ValueError, match="has no text encoder; pass prompts"):
        apply_layerbind(pipe, scene.layout)
    with pytest.raises(ValueError, match="1 prompts and 0 negative ones for 2 layers"):
        apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe, 1))
    wrong = scene.prompts(pipe)
    wrong = wrong._replace(background=wrong.background._replace(tokens=torch.zeros(1, 4, 32)))
    with pytest.raises(ValueError, match=r"use \[T, D\] and \[P\]"):
        apply_layerbind(pipe, scene.layout, prompts=wrong)


def test_one_layout_at_a_time(tiny, scene):
    pipe = tiny.pipeline("sd3")
    handle = apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe))
    with pytest.raises(ValueError, match="has a layout already"):
        apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe))
    handle.remove()
    apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe)).remove()


def test_a_small_mask_that_holds_no_token_is_an_error(tiny, scene):
    pipe = tiny.pipeline("sd3")
    mask = torch.zeros(64, 64)
    mask[0, 0] = 1
    layout = dataclasses.replace(scene.layout, layers=(Layer(prompt="a", mask=mask),))
    with (
        apply_layerbind(pipe, layout, prompts=scene.prompts(pipe, 1)),
        pytest.raises(ValueError, match="covers no token"),
    ):
        scene.draw(pipe)
