"""Folders of other libraries, both ways, with those libraries where they run on a CPU."""

import contextlib
import json
import warnings

import pytest
import torch
from eff_quant import FP4Config, FP4Linear, load, load_fp4_checkpoint, quantize_, save_fp4_checkpoint
from safetensors.torch import load_file
from torch import nn

with contextlib.suppress(ImportError), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import compressed_tensors
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
PRESETS = {
    "NVFP4": FP4Config(activations="static"),
    "NVFP4A16": FP4Config(),
    "MXFP4": FP4Config(format="mxfp4", scale_rounding="even", activations="dynamic"),
    "MXFP4A16": FP4Config(format="mxfp4", scale_rounding="even"),
}


@pytest.fixture
def theirs():
    """A function that loads a folder through transformers, as somebody without eff-quant does."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, FP4Linear)}


def buffers(model):
    return {n: {k: b.clone().view(torch.uint8) for k, b in m.named_buffers()} for n, m in layers(model).items()}


def same(a, b):
    return all(torch.equal(t, b[n][k]) for n, group in a.items() for k, t in group.items()) and a.keys() == b.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_what_we_save_they_load_with_the_same_weights(ids, tmp_path, theirs, preset, fp4_model):
    config = PRESETS[preset]
    model = fp4_model(config)
    save_fp4_checkpoint(model, tmp_path)
    other = theirs(tmp_path)
    logits, expected = other(ids).logits, model(ids).logits
    for name, layer in layers(model).items():
        weight, ours = other.get_submodule(name).weight.float(), layer.dequantize()
        # NVFP4: they multiply scales in bfloat16, two roundings of 2^-9 at most
        bound = 2.0**-8 * ours.abs() if config.format == "nvfp4" else 0
        assert ((weight - ours).abs() <= bound).all()
    assert rms(logits - expected) < 0.01 * rms(expected) or config.activations
    check_rounding(model, other, ids)


def rms(x):
    return x.float().pow(2).mean().sqrt().item()


def check_rounding(model, other, ids):
    """Each layer rounds its input as theirs does; their NVFP4 scales are bfloat16, which moves values near a tie."""
    inputs = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0]}))
        for name, m in layers(model).items()
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    for name, layer in layers(model).items():
        x = inputs[name]
        y, expected, plain = layer(x), other.get_submodule(name)(x), nn.functional.linear(x, layer.weight)
        if layer.config.activations is None:
            assert rms(y - expected) < 0.01 * rms(expected)
        else:
            share = 0.5 if layer.config.format == "nvfp4" else 0.001
            assert rms(y - expected) < share * rms(y - plain)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_settings_are_theirs_to_the_letter(llama, tmp_path, theirs, preset, fp4_model):
    model = fp4_model(PRESETS[preset])
    save_fp4_checkpoint(model, tmp_path / "ours")
    their_folder(llama, tmp_path / "theirs", preset)
    ours, expected = (
        json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        for folder in ("ours", "theirs")
    )
    assert ours.pop("version").split(".")[:2] == expected.pop("version").split(".")[:2]
    assert ours == expected
    kinds = [
        {k: (t.dtype, t.shape) for k, t in load_file(tmp_path / folder / "model.safetensors").items()}
        for folder in ("ours", "theirs")
    ]
    assert kinds[0] == kinds[1]


def their_folder(llama, path, preset, input_scale=300.0):
    """A folder that compressed-tensors quantised and wrote, and the float model that it came from."""
    pytest.importorskip("compressed_tensors")
    model = llama(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(30)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        weight, scale = module.weight.detach(), None
        if hasattr(module, "weight_global_scale"):
            scale = generate_gparam(weight.min(), weight.max())
            module.weight_global_scale.data.copy_(scale)
        if hasattr(module, "input_global_scale"):
            module.input_global_scale.data.fill_(input_scale)
        blocks = weight.unflatten(-1, (-1, scheme.weights.group_size))
        module.weight_scale.data, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(path)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_they_save_we_load_with_the_same_weights(llama, ids, tmp_path, theirs, preset):
    their_folder(llama, tmp_path, preset)
    other, model = theirs(tmp_path), load_fp4_checkpoint(tmp_path)
    assert model.config.dtype == torch.bfloat16
    expected, logits = other(ids).logits, model(ids).logits
    found = layers(model)
    assert len(found) == 14
    for name, layer in found.items():
        weight, ours = other.get_submodule(name).weight.float(), layer.dequantize()
        bound = 2.0**-8 * ours.abs() if preset.startswith("NV") else 0
        assert ((weight - ours).abs() <= bound).all()
        assert layer.config.activations == PRESETS[preset].activations
        assert layer.config.format == PRESETS[preset].format
    scale = found[UP].weight_global_scale
    assert scale is None or 20 * scale < found[DOWN].weight_global_scale  # far from 1 and from one another
    assert rms(logits - expected) < 0.01 * rms(expected) or not preset.endswith("A16")
    check_rounding(model, other, ids)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_changes_no_bit(ids, tmp_path, preset, dtype, fp4_model):
    model = fp4_model(PRESETS[preset], dtype)
    logits = model(ids).logits
    save_fp4_checkpoint(model, tmp_path / "one", max_shard_size="60KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    again = load_fp4_checkpoint(tmp_path / "one")
    assert same(buffers(model), buffers(again))
    assert torch.equal(again(ids).logits, logits)
    again.save_pretrained(tmp_path / "own")  # in our own settings
    assert torch.equal(load(tmp_path / "own")(ids).logits, logits)
    with pytest.raises(ValueError, match=r"saved in our own settings; use eff_quant\.load"):
        load_fp4_checkpoint(tmp_path / "own")
    save_fp4_checkpoint(again, tmp_path / "two")
    assert same(buffers(load_fp4_checkpoint(tmp_path / "two")), buffers(model))


def test_biases_and_tied_embeddings_travel_too(llama, ids, tmp_path, theirs):
    model = llama(torch.bfloat16, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.normal_()
    quantize_(model, FP4Config())
    save_fp4_checkpoint(model, tmp_path)
    expected = model(ids).logits
    assert torch.equal(load_fp4_checkpoint(tmp_path)(ids).logits, expected)
    assert rms(theirs(tmp_path)(ids).logits - expected) < 0.01 * rms(expected)


@pytest.mark.parametrize("preset", ["NVFP4", "MXFP4"])
def test_activations_can_be_left_as_they_are(ids, tmp_path, preset, fp4_model):
    model = fp4_model(PRESETS[preset])
    save_fp4_checkpoint(model, tmp_path / "rounded")
    plain = load_fp4_checkpoint(tmp_path / "rounded", round_activations=False)
    assert {m.config.activations for m in layers(plain).values()} == {None}
    expected = fp4_model(PRESETS[f"{preset}A16"])(ids).logits
    assert torch.equal(plain(ids).logits, expected)
    plain.save_pretrained(tmp_path / "own")
    assert torch.equal(load(tmp_path / "own")(ids).logits, expected)


def test_saving_leaves_the_model_as_it_was(tmp_path, fp4_model):
    model = fp4_model(FP4Config())
    before, settings, quantizer = buffers(model), model.config.quantization_config, model.hf_quantizer
    save_fp4_checkpoint(model, tmp_path)
    assert same(before, buffers(model))
    assert model.config.quantization_config is settings
    assert model.hf_quantizer is quantizer


def test_modelopt_and_back(ids, tmp_path, fp4_model):
    model = fp4_model(PRESETS["NVFP4"])
    save_fp4_checkpoint(model, tmp_path, layout="modelopt")
    state = load_file(tmp_path / "model.safetensors")
    kinds = {k.removeprefix(UP + "."): (t.dtype, tuple(t.shape)) for k, t in state.items() if k.startswith(UP)}
    assert kinds == {
        "weight": (torch.uint8, (128, 32)),
        "weight_scale": (torch.float8_e4m3fn, (128, 4)),
        "weight_scale_2": (torch.float32, ()),
        "input_scale": (torch.float32, ()),
    }
    up = layers(model)[UP]
    assert state[f"{UP}.weight_scale_2"] * up.weight_global_scale == pytest.approx(1, rel=2**-22)
    assert state[f"{UP}.input_scale"] * up.input_global_scale == pytest.approx(1, rel=2**-22)
    settings = json.loads((tmp_path / "hf_quant_config.json").read_text())
    assert settings["quantization"]["quant_algo"] == "NVFP4"
    assert settings["quantization"]["exclude_modules"] == ["lm_head"]
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "modelopt"
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    again = load_fp4_checkpoint(tmp_path)
    assert again.generation_config.eos_token_id == 7
    for name, layer in layers(again).items():
        torch.testing.assert_close(layer.dequantize(), layers(model)[name].dequantize(), rtol=2**-22, atol=0)
        assert torch.equal(layer.weight_packed, layers(model)[name].weight_packed)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0.02, atol=0.02)


def test_the_version_that_we_name_is_one_that_was_tested():
    pytest.importorskip("compressed_tensors")
    from eff_quant.fp4.settings import COMPRESSED_TENSORS

    assert compressed_tensors.__version__.split(".")[:2] == COMPRESSED_TENSORS.split(".")[:2]
