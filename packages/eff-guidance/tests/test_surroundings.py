"""The table: each way to act on a denoiser beside what else is done to denoisers; right, or refused with a clear text.

"Right" is what the method gives on the model as it is: exactly, to rounding, or, where weights are rounded, near it and
still unlike what the model gives without the method. LayerBind, which needs a pipeline, has its row in
``layerbind/test_layerbind_interop.py``; whole pipelines with guidance, and compiling the other methods, have theirs
beside each method.
"""

import contextlib

import pytest
import torch
from eff_guidance.attencraft import AttentionStore, train_projections
from eff_guidance.context_brush import CanvasSpans, apply_incontext_brush
from eff_guidance.head_guidance import SoftPAGConfig, perturbed_heads
from eff_guidance.pokefusion import StyleAttentionConfig, add_style_attention
from eff_guidance.refam import capture_joint_attention

SPANS = CanvasSpans(grid=(8, 8), subjects=((0, 0, 4, 8),), query=(4, 0, 8, 8))
JOINT, UNETS = ("sd3", "sd3.5", "flux", "flux-fill"), ("sd15", "sdxl")


def forward(model, given):
    return model(**given, return_dict=False)[0]


def brush(model, given):
    with apply_incontext_brush(model, SPANS):
        return forward(model, given)


def heads(model, given):
    with perturbed_heads(model, SoftPAGConfig(heads=((0, 1), (2, 0)), strength=0.7)):
        return forward(model, given)


def style(model, given):
    torch.manual_seed(1)
    config = StyleAttentionConfig(style_dim=16, tokens_per_style=4, gate_init=1.0)
    with add_style_attention(model, config) as handle:
        draw = torch.Generator().manual_seed(2)  # weights that no kind of base weights can change
        for name, parameter in handle.adapter.named_parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw) * (0 if name.endswith("gate") else 0.3)
            parameter.data += name.endswith("gate")
        with handle.use():
            return forward(model, given)


def pointing(model, given):
    with capture_joint_attention(model) as found:
        forward(model, given)
    return torch.stack([m.float() for m in found.maps.values()])


def concepts(model, given):
    """Keys and values of the text as learnt: those of the model, twice as large."""
    handle, layers = train_projections(model)
    with handle, torch.no_grad():
        for layer in layers.values():
            layer.weight.mul_(2)
        return forward(model, given)


def reading(model, given):
    with AttentionStore(model, [1, 2], cross_size=(8, 8)) as store:
        forward(model, given)
        return store.cross.float()


METHODS = {
    "heads": (heads, (*JOINT, *UNETS)),
    "context_brush": (brush, JOINT),
    "pokefusion": (style, (*JOINT, *UNETS)),
    "refam": (pointing, JOINT),
    "attencraft, learnt": (concepts, (*JOINT, *UNETS)),
    "attencraft, maps": (reading, (*JOINT, *UNETS)),
}
WATCHES = ("refam", "attencraft, maps")  # these change no output, but give maps
CASES = [(method, kind) for method, (_, kinds) in METHODS.items() for kind in kinds]
pytestmark = pytest.mark.usefixtures("plain_again")


@pytest.fixture
def plain_again():
    """diffusers keeps the backend that a model was given for all models; dynamo keeps its code."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry._active_backend
    with torch.no_grad():
        yield
    _AttentionBackendRegistry._active_backend = before


def fresh(tiny, kind):
    return tiny.model("flux", channels=96) if kind == "flux-fill" else tiny.model(kind)


def case(tiny, method, kind):
    model = fresh(tiny, kind)
    given = tiny.inputs(model)
    return METHODS[method][0], model, given, METHODS[method][0](model, given)


def close(found, wanted, error=1e-5):
    return bool((found - wanted).norm() <= error * wanted.norm())


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_a_batch_gives_what_its_rows_give_alone(tiny, method, kind):
    act, model, _, _ = case(tiny, method, kind)
    given = tiny.inputs(model, count=2)
    if "maps" in method:  # of one sample alone: both are the same
        given = _each(given, lambda v: v[:1].repeat(2, *[1] * (v.dim() - 1)))
    both = act(model, given)
    for row in range(2):
        one = _each(given, lambda v, row=row: v[row : row + 1])
        alone = act(model, one)
        if method == "refam":
            assert close(both[:, row : row + 1], alone)
        else:
            assert close(both if "maps" in method else both[row : row + 1], alone)


def _each(value, change):
    if isinstance(value, dict):
        return {k: _each(v, change) for k, v in value.items()}
    return change(value) if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == 2 else value


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_group_offload(tiny, method, kind):
    act, model, given, wanted = case(tiny, method, kind)
    here = torch.device("cpu")
    model.enable_group_offload(here, here, offload_type="leaf_level")
    assert close(act(model, given), wanted)


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_layerwise_casting(tiny, method, kind):
    act, model, given, wanted = case(tiny, method, kind)
    cast = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    if method == "attencraft, learnt":  # begins as a copy of floating weights
        handle, layers = train_projections(model)
        for layer in layers.values():
            layer.weight.mul_(2)
        model.enable_layerwise_casting(**cast)
        assert close(forward(model, given), wanted, 0.3)
        handle.remove()
        model = fresh(tiny, kind)
        model.enable_layerwise_casting(**cast)
        with pytest.raises(ValueError, match="then cast"):
            act(model, given)
        return
    model.enable_layerwise_casting(**cast)
    found, plain = act(model, given), forward(model, given)
    assert close(found, wanted, 0.3)
    assert method in WATCHES or not close(found, plain, 1e-3)


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_int8_weights(tiny, method, kind):
    quant = pytest.importorskip("eff_quant")
    act, model, given, wanted = case(tiny, method, kind)
    assert quant.quantize_(model, quant.Int8Config()).changed
    found, plain = act(model, given), forward(model, given)
    assert close(found, wanted, 0.2)
    assert method in WATCHES or not close(found, plain, 1e-3)


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_lora(tiny, method, kind):
    peft = pytest.importorskip("peft")
    act, model, given, wanted = case(tiny, method, kind)
    torch.manual_seed(0)
    # Early layers too: what is learnt of the text's keys and values may stand for those of the LoRA.
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
    assert not close(act(model, given), wanted, 1e-3)
    model.disable_adapters()
    assert close(act(model, given), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*WATCHES, "attencraft, learnt"])
def test_a_compiled_model(tiny, method):
    act = METHODS[method][0]
    model = tiny.model("sd3", **({"layers": 1} if method == "refam" else {}))
    given = tiny.inputs(model)
    wanted = act(model, given)
    torch._dynamo.reset()
    try:
        model.compile(backend="eager")
        assert close(act(model, given), wanted)
    finally:
        torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(("method", "kind"), [c for c in CASES if c[0] != "attencraft, learnt" and c[1] == "flux"])
def test_other_backends(tiny, method, kind):
    """The variants of PyTorch's kernel are right; of others no rule sees anything, and they say so."""
    act, model, given, wanted = case(tiny, method, kind)
    model.set_attention_backend("_native_math")
    assert close(act(model, given), wanted)
    model.set_attention_backend("flex")
    with pytest.raises(RuntimeError, match="native"), contextlib.ExitStack():
        act(model, given)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_what_is_learnt_works_with_other_backends(tiny):
    act, model, given, wanted = case(tiny, "attencraft, learnt", "flux")
    model.set_attention_backend("flex")
    assert close(act(model, given), wanted, 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_context_parallelism(tiny, method, monkeypatch):
    """A processor that was told to split its attention: only what acts on weights alone goes with it.

    The splitting itself, which needs several processes, is left out.
    """
    from diffusers.models.transformers import transformer_flux

    act, model, given, wanted = case(tiny, method, "flux")
    whole = transformer_flux.dispatch_attention_fn

    def unsplit(*args, parallel_config=None, **more):
        assert parallel_config == "two processes"
        return whole(*args, **more)

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", unsplit)
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = "two processes"
    if method == "attencraft, learnt":
        assert close(act(model, given), wanted)
        return
    with pytest.raises(RuntimeError, match="context parallel"):
        act(model, given)
