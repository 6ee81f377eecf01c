"""Adapters of PEFT of several kinds on each format: they compute, train and merge as on the dequantised model."""

import copy

import pytest
import torch
from eff_quant import FP4Config, FP8Config, Int8Config, W4A8Config, dequantize_, load, merge_lora, quantize_
from eff_quant.layer import QuantizedLinear

peft = pytest.importorskip("peft")

# PEFT asks transformers for a property that is being renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

# With float activations the layer is the dequantised one, so that gradients agree to the last digits.
FORMATS = {
    "int8": Int8Config(activation="none"),
    "fp8": FP8Config(),
    "nvfp4": FP4Config(),
    "mxfp4": FP4Config(format="mxfp4"),
    "w4a8": W4A8Config(rotation="hadamard"),
}
KINDS = {
    "lora": {"init_lora_weights": False},
    "rslora": {"init_lora_weights": False, "use_rslora": True},
    "dora": {"init_lora_weights": False, "use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
}
formats = pytest.mark.parametrize("format", FORMATS)
kinds = pytest.mark.parametrize("kind", KINDS)
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def pair(llama):
    """``pair(format, kind)``: a quantised model with adapters, and its twin on dequantised layers."""

    def make(format, kind):
        model = llama()
        quantize_(model, FORMATS[format])
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS, **KINDS[kind])).eval()
        twin = copy.deepcopy(adapted)
        dequantize_(twin)
        assert not any(isinstance(m, QuantizedLinear) for m in twin.modules())
        return adapted, twin

    return make


def near(format):
    return 0.05 if format == "w4a8" else 1e-4


def gradients(model, ids):
    model(ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "lora_" in n])


def bases(model):
    return {n: m.base_layer for n, m in model.named_modules() if hasattr(m, "base_layer")}


@formats
@kinds
def test_outputs_and_gradients_are_those_of_the_dequantised_model(pair, ids, format, kind):
    adapted, twin = pair(format, kind)
    found, wanted = adapted(ids).logits, twin(ids).logits
    assert (found - wanted).norm() < near(format) * wanted.norm()
    found, wanted = gradients(adapted, ids), gradients(twin, ids)
    assert wanted.norm() > 0
    assert (found - wanted).norm() < 5 * near(format) * wanted.norm()


@formats
@kinds
def test_merging_quantises_what_the_float_twin_merges_to(pair, format, kind):
    adapted, twin = pair(format, kind)
    before = {n: copy.deepcopy(m) for n, m in bases(adapted).items()}
    assert len(before) == 6
    merged = twin.merge_and_unload()
    wanted = {n: m.requantized_tensors(merged.get_submodule(inner(n)).weight) for n, m in before.items()}
    theirs = copy.deepcopy(adapted).merge_and_unload()
    ours, report = merge_lora(adapted)
    assert len(report.changed) == 6
    for model in (ours, theirs):
        for name, tensors in wanted.items():
            layer = model.get_submodule(inner(name))
            assert isinstance(layer, QuantizedLinear)
            for leaf, tensor in tensors.items():
                close(getattr(layer, leaf), tensor, f"{name}.{leaf}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_adds_the_adapter_s_own_bias(llama, dtype):
    model = llama(dtype, attention_bias=True)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    quantize_(model, Int8Config())
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, init_lora_weights=False)
    )
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if name.endswith("lora_B.default.bias"):
            torch.nn.init.normal_(parameter)
    wanted = {n: m.base_layer.bias + m.lora_B["default"].bias * m.scaling["default"]
              for n, m in adapted.named_modules() if hasattr(m, "base_layer")}  # fmt: skip
    merged, _ = merge_lora(adapted)
    assert len(wanted) == 2
    for name, bias in wanted.items():
        torch.testing.assert_close(merged.get_submodule(inner(name)).bias, bias.to(dtype))


def test_a_failed_merge_leaves_biases(llama):
    model = llama(attention_bias=True)
    quantize_(model, Int8Config())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True))
    *_, last = (m for m in adapted.modules() if hasattr(m, "base_layer"))
    first = next(m for m in adapted.modules() if hasattr(m, "base_layer")).base_layer
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith("lora_B.default.bias"):
                parameter.fill_(1.0)
        last.lora_A["default"].weight[0, 0] = torch.nan
        before = first.bias.clone()
    with pytest.raises(ValueError, match="NaN"):
        merge_lora(adapted)
    assert torch.equal(first.bias, before)


@formats
@kinds
def test_an_adapter_is_saved_and_loaded(pair, ids, tmp_path, format, kind):
    """PiSSA and OLoRA change the base as well, which is then saved with its adapter, and not to be changed again."""
    adapted, _ = pair(format, kind)
    wanted = adapted(ids).logits
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "adapter")
    base = copy.deepcopy(adapted).unload()
    base.save_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(again(ids).logits, wanted)


def inner(name):
    return name.removeprefix("base_model.model.")


def close(found, wanted, name):
    """Equal, but for a code at the border of two that another order of sums moves."""
    found, wanted = (t.contiguous().view(torch.uint8) if t.dtype.itemsize == 1 else t for t in (found, wanted))
    if found.is_floating_point():
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    else:
        assert (found != wanted).float().mean() < 0.01, name
