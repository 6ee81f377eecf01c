"""Together with what else is done to diffusion models."""

import pytest
import torch
from eff_guidance.layerbind import Layer, LayerBindConfig, Layout, apply_layerbind, layerbind_generate
from eff_kernels.edit.attention import intercept_attention

KINDS = ["sd3", "sd3.5", "flux"]


def close(found, wanted, error=1e-5):
    return (found - wanted).norm() <= error * wanted.norm()


def drawn(scene, pipe):
    with apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe)):
        return scene.draw(pipe)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "way"), [("sd3", "in place"), ("flux", "blocks")])
def test_compile(tiny, scene, kind, way):
    pipe = tiny.pipeline(kind, layers=1, **({"single": 1} if kind == "flux" else {}))
    plain, wanted = scene.draw(pipe), drawn(scene, pipe)
    torch._dynamo.reset()
    if way == "in place":
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer.compile_repeated_blocks(backend="eager")
    try:
        assert close(scene.draw(pipe), plain)  # code compiled without a layout must not serve one with it
        handle = apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe))
        assert close(scene.draw(pipe), wanted)
        handle.remove()
        assert close(scene.draw(pipe), plain)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offload", ["block_level", "leaf_level"])
@pytest.mark.parametrize("first", [True, False])
def test_group_offload(tiny, scene, kind, offload, first):
    pipe = tiny.pipeline(kind)
    wanted = drawn(scene, pipe)
    more = {"num_blocks_per_group": 1} if offload == "block_level" else {}
    here = torch.device("cpu")
    put = lambda: pipe.transformer.enable_group_offload(here, here, offload_type=offload, **more)  # noqa: E731
    if first:
        put()
        assert close(drawn(scene, pipe), wanted)
    else:
        with apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe)):
            put()
            assert close(scene.draw(pipe), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_layerwise_casting(tiny, scene, kind):
    pipe = tiny.pipeline(kind)
    wanted = drawn(scene, pipe)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    found = drawn(scene, pipe)
    assert not torch.equal(found, wanted)
    assert close(found, wanted, 0.2)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_lora(tiny, scene, kind):
    peft = pytest.importorskip("peft")
    pipe = tiny.pipeline(kind)
    wanted = drawn(scene, pipe)
    torch.manual_seed(0)
    pipe.transformer.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q", "add_k_proj", "to_out.0"], init_lora_weights=False)
    )
    with apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe)):
        changed = scene.draw(pipe)
        assert not close(changed, wanted, 1e-3)
        assert close(scene.draw(pipe, joint_attention_kwargs={"scale": 0.0}), wanted)
        pipe.transformer.disable_adapters()
        assert close(scene.draw(pipe), wanted)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_quantised_weights(tiny, scene, kind):
    quant = pytest.importorskip("eff_quant")
    pipe = tiny.pipeline(kind)
    wanted = drawn(scene, pipe)
    report = quant.quantize_(pipe.transformer, quant.Int8Config())
    assert report.changed
    found = drawn(scene, pipe)
    assert not torch.equal(found, wanted)
    assert close(found, wanted, 0.2)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_fused_projections(tiny, scene, kind):
    pipe = tiny.pipeline(kind)
    wanted = drawn(scene, pipe)
    pipe.transformer.fuse_qkv_projections()
    assert close(drawn(scene, pipe), wanted, 1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_backends_that_no_rule_reaches_are_refused(tiny, scene):
    pipe = tiny.pipeline("flux")
    pipe.transformer.set_attention_backend("flex")
    try:
        with (
            apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe)),
            pytest.raises(RuntimeError, match="native"),
        ):
            scene.draw(pipe)
    finally:
        pipe.transformer.set_attention_backend("native")  # diffusers takes it for other models as well


def test_caches_are_refused(tiny, scene):
    from diffusers import FirstBlockCacheConfig

    pipe = tiny.pipeline("flux")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with (
        apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe)),
        pytest.raises(ValueError, match="disable_cache"),
    ):
        scene.draw(pipe)


def test_another_rule_needs_an_order(tiny, scene):
    pipe = tiny.pipeline("sd3")
    scaled = lambda call, attend: attend(call.replace(scale=call.scale * 0.5))  # noqa: E731
    with intercept_attention(pipe.transformer, scaled, order=2):
        with pytest.raises(ValueError, match="give each its own order"):
            apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe))
        alone = scene.draw(pipe)
        with apply_layerbind(pipe, scene.layout, prompts=scene.prompts(pipe), order=1):
            assert not torch.equal(scene.draw(pipe), alone)
        assert torch.equal(scene.draw(pipe), alone)


def test_autocast(tiny, scene):
    pipe = tiny.pipeline("sd3")
    wanted = drawn(scene, pipe)
    with torch.autocast("cpu", torch.bfloat16):
        assert close(drawn(scene, pipe).float(), wanted, 0.05)


def test_collage_diffusion_encodes_its_own_prompts(collages):
    """The trained model draws two objects where they were asked for."""
    from eff_embedded.judge import load_judge

    layout = Layout(
        size=(128, 128), background="a blue background",
        layers=(Layer(prompt="a panda", box=(0, 0, 64, 64)), Layer(prompt="a car", box=(64, 64, 128, 128))),
    )  # fmt: skip
    images, state = layerbind_generate(
        collages, layout, LayerBindConfig(eta1=0.4), prompt="a panda and a car on a blue background", seed=1
    )
    (reading,) = load_judge()(images)
    assert {"panda", "car"} <= set(reading.names)
    (preview,) = state.preview()
    assert preview.size == (128, 128)
