"""Folders of other libraries, both ways, with those libraries where they run on a CPU."""

import contextlib
import json
import warnings

import pytest
import torch
from eff_quant import (
    FP4Config,
    FP4Linear,
    Int8Config,
    calibrate_fp4,
    load,
    load_fp4_checkpoint,
    quantize_,
    save_fp4_checkpoint,
)
from safetensors.torch import load_file, save_file
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


def fp4_model(llama, ids, config, dtype=torch.bfloat16):
    model = llama(dtype)
    with torch.no_grad():  # some life in the weights: tensor scales far from 1, an outlier
        model.model.layers[0].mlp.up_proj.weight.mul_(30)
        model.model.layers[1].mlp.down_proj.weight[3, 5] = 2.0
    ranges = calibrate_fp4(model, [{"input_ids": ids}])
    quantize_(model, config)
    if config.activations == "static":
        ranges.set_input_scales(model)
    return model


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, FP4Linear)}


def buffers(model):
    return {n: {k: b.clone().view(torch.uint8) for k, b in m.named_buffers()} for n, m in layers(model).items()}


def same(a, b):
    return all(torch.equal(t, b[n][k]) for n, group in a.items() for k, t in group.items()) and a.keys() == b.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_what_we_save_they_load_with_the_same_weights(llama, ids, tmp_path, theirs, preset):
    config = PRESETS[preset]
    model = fp4_model(llama, ids, config)
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
def test_the_settings_are_theirs_to_the_letter(llama, ids, tmp_path, theirs, preset):
    model = fp4_model(llama, ids, PRESETS[preset])
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
def test_a_round_trip_changes_no_bit(llama, ids, tmp_path, preset, dtype):
    model = fp4_model(llama, ids, PRESETS[preset], dtype)
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


def test_saving_leaves_the_model_as_it_was(llama, ids, tmp_path):
    model = fp4_model(llama, ids, FP4Config())
    before, settings, quantizer = buffers(model), model.config.quantization_config, model.hf_quantizer
    save_fp4_checkpoint(model, tmp_path)
    assert same(before, buffers(model))
    assert model.config.quantization_config is settings
    assert model.hf_quantizer is quantizer


def test_modelopt_and_back(llama, ids, tmp_path):
    model = fp4_model(llama, ids, PRESETS["NVFP4"])
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
    again = load_fp4_checkpoint(tmp_path)
    for name, layer in layers(again).items():
        torch.testing.assert_close(layer.dequantize(), layers(model)[name].dequantize(), rtol=2**-22, atol=0)
        assert torch.equal(layer.weight_packed, layers(model)[name].weight_packed)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0.02, atol=0.02)


def test_modelopt_without_input_scales_is_weight_only(llama, ids, tmp_path):
    model = fp4_model(llama, ids, PRESETS["NVFP4"])
    save_fp4_checkpoint(model, tmp_path, layout="modelopt")
    edit(tmp_path, lambda s: [s.pop(k) for k in list(s) if k.endswith("input_scale")])
    assert layers(load_fp4_checkpoint(tmp_path))[UP].config.activations is None
    edit(tmp_path, lambda s: s.update({f"{UP}.input_scale": torch.tensor(1.0)}))
    with pytest.raises(ValueError, match=f"{UP} has an input_scale, .* has none"):
        load_fp4_checkpoint(tmp_path)


def test_a_quantised_cache_is_not_passed_over_in_silence(llama, ids, tmp_path):
    model = fp4_model(llama, ids, FP4Config())
    save_fp4_checkpoint(model, tmp_path)
    settings(tmp_path, lambda s: s.update(kv_cache_scheme={"num_bits": 8, "type": "float"}))
    with pytest.warns(UserWarning, match="the cache of keys and values is not quantised, though the file says"):
        load_fp4_checkpoint(tmp_path)


def edit(folder, change):
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def settings(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def put(key, value):
    return lambda s: s.__setitem__(key, value)


def nan_scale(s):
    scale = s[f"{UP}.weight_scale"].view(torch.uint8)
    scale[4, 1] = 255


@pytest.fixture
def folder(llama, ids, tmp_path):
    save_fp4_checkpoint(fp4_model(llama, ids, PRESETS["NVFP4"]), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda s: s.pop(f"{UP}.weight_scale"), KeyError, f"{UP}: weight_packed without weight_scale"),
        (lambda s: s.pop(f"{UP}.weight_global_scale"), KeyError, f"{UP}: weight_packed without weight_global_scale"),
        (lambda s: s.pop(f"{UP}.input_global_scale"), KeyError, f"{UP}: no input_global_scale"),
        (lambda s: s.pop(f"{UP}.weight_packed"), KeyError, f"{UP}.weight_scale belongs to no FP4 weight"),
        (put(f"{UP}.weight_packed", torch.zeros(128, 16, dtype=torch.uint8)), ValueError, r"shape \[128, 4\], wanted"),
        (put(f"{UP}.weight_packed", torch.zeros(128, 32)), TypeError, r"weight_packed has dtype torch\.float32"),
        (put(f"{UP}.weight_scale", torch.zeros(128, 4)), TypeError, r"weight_scale has dtype torch\.float32"),
        (put(f"{UP}.weight_global_scale", torch.zeros(1)), ValueError, f"{UP}: weight_global_scale is 0.0"),
        (put(f"{UP}.input_global_scale", torch.tensor([-1.0])), ValueError, f"{UP}: input_global_scale is -1.0"),
        (nan_scale, ValueError, f"{UP}: weight_scale of row 4, block 1 is NaN"),
        (lambda s: [s.pop(k) for k in list(s) if k.rpartition(".")[2] != "weight"], ValueError, "no FP4 weights"),
    ],
)
def test_damaged_tensors_are_errors_that_name_the_layer(folder, change, error, says):
    edit(folder, change)
    with pytest.raises(error, match=says):
        load_fp4_checkpoint(folder)


def test_weights_of_another_size_than_the_model_are_an_error(folder):
    def halve(s):
        for leaf in ("weight_packed", "weight_scale"):
            s[f"{UP}.{leaf}"] = s[f"{UP}.{leaf}"].view(torch.uint8)[:64].view(s[f"{UP}.{leaf}"].dtype).contiguous()

    edit(folder, halve)
    with pytest.raises(ValueError, match=rf"{UP}: weight_packed has shape \[64, 32\], wanted \[128, 32\]"):
        load_fp4_checkpoint(folder)


def test_nan_bytes_of_mxfp4_are_an_error(llama, ids, tmp_path):
    save_fp4_checkpoint(fp4_model(llama, ids, PRESETS["MXFP4A16"]), tmp_path)
    edit(tmp_path, nan_scale)
    with pytest.raises(ValueError, match=f"{UP}: weight_scale of row 4, block 1 is NaN"):
        load_fp4_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [5, 1000, 50_000])
def test_a_truncated_file_is_an_error_that_names_it(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        load_fp4_checkpoint(folder)


def test_a_missing_shard_is_an_error_that_names_it(llama, ids, tmp_path):
    save_fp4_checkpoint(fp4_model(llama, ids, FP4Config()), tmp_path, max_shard_size="60KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(OSError, match=rf"lacks \['{gone.name}'\], which model\.safetensors\.index\.json names"):
        load_fp4_checkpoint(tmp_path)


def group(**changes):
    return lambda s: s["config_groups"]["group_0"].update(changes)


def weights(**changes):
    return lambda s: s["config_groups"]["group_0"]["weights"].update(changes)


def inputs(**changes):
    return lambda s: s["config_groups"]["group_0"]["input_activations"].update(changes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.update(quant_method="gptq"), "quant_method='gptq'; wanted 'compressed-tensors' or 'modelopt'"),
        (lambda s: s.update(quant_method="modelopt", quant_algo="FP8"), "quant_algo='FP8' of ModelOpt; wanted 'NVFP4'"),
        (lambda s: s["config_groups"].update(group_1={}), r"config_groups has \['group_0', 'group_1'\]; wanted one"),
        (group(format="float-quantized"), "format 'float-quantized' is not FP4"),
        (group(format="mxfp4-pack-quantized"), "weights.group_size=16, wanted 32 for mxfp4"),
        (weights(num_bits=8), "weights.num_bits=8, wanted 4"),
        (weights(symmetric=False), "weights.symmetric=False"),
        (inputs(num_bits=8), "input_activations.num_bits=8, wanted 4"),
        (inputs(dynamic=True), "input_activations.dynamic=True, wanted 'local' for nvfp4"),
        (group(output_activations={"num_bits": 8}), "output_activations are quantised"),
        (lambda s: s.update(transform_config={"a": 1}), "transform_config is set"),
    ],
)
def test_settings_that_we_do_not_have_are_refused(folder, change, says):
    settings(folder, change)
    with pytest.raises(ValueError, match=says):
        load_fp4_checkpoint(folder)


def test_other_folders_are_refused(llama, tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quant_method=None; wanted 'compressed-tensors' or 'modelopt'"):
        load_fp4_checkpoint(tmp_path)
    with pytest.raises(OSError, match="nowhere is no folder"):
        load_fp4_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="holds no safetensors files"):
        load_fp4_checkpoint(tmp_path / "empty")
    with pytest.raises(TypeError, match="takes a transformers model, got Linear"):
        save_fp4_checkpoint(nn.Linear(2, 2), tmp_path)


def test_a_group_of_mixed_precision_is_not_exported(llama, tmp_path):
    for format in ("nvfp4", "mxfp4"):
        model = llama()
        quantize_(model, FP4Config(format=format, skip=("lm_head", "model.layers.1.self_attn.k_proj")))
        says = rf"model\.layers\.1\.self_attn has .*'q_proj': '{format}', 'k_proj': 'float', 'v_proj': '{format}'"
        with pytest.raises(ValueError, match=says):
            save_fp4_checkpoint(model, tmp_path)


def test_a_group_with_several_tensor_scales_is_not_exported(llama, tmp_path):
    model = llama()
    quantize_(model, FP4Config(fuse_groups=(("gate_proj", "up_proj"),)))
    save_fp4_checkpoint(model, tmp_path)  # the groups are those of the config
    quantize_(model := llama(), FP4Config())
    up = model.model.layers[1].mlp.up_proj
    up.weight_global_scale = up.weight_global_scale * 2
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp has the tensor scales \{'gate_proj': .*'up_proj'"):
        save_fp4_checkpoint(model, tmp_path)


def test_models_that_others_cannot_load_are_not_exported(llama, ids, tmp_path):
    with pytest.raises(ValueError, match="the model has no FP4 layers"):
        save_fp4_checkpoint(llama(), tmp_path)
    with pytest.raises(ValueError, match="layout='gpt-oss'; use one of 'compressed-tensors', 'modelopt'"):
        save_fp4_checkpoint(llama(), tmp_path, layout="gpt-oss")
    quantize_(model := llama(), FP4Config(activations="static"))
    with pytest.raises(ValueError, match=r"self_attn\.q_proj has no scale for its input yet; use calibrate_fp4"):
        save_fp4_checkpoint(model, tmp_path)
    quantize_(model := llama(), FP4Config(activations="dynamic"))
    with pytest.raises(ValueError, match="has no NVFP4 activations without a calibrated scale"):
        save_fp4_checkpoint(model, tmp_path)
    for config in (FP4Config(), PRESETS["MXFP4"]):
        quantize_(model := llama(), config)
        with pytest.raises(ValueError, match=r"ModelOpt's NVFP4 has nvfp4 weights and static activations, got"):
            save_fp4_checkpoint(model, tmp_path, layout="modelopt")
    model = llama()
    quantize_(model, {"*.mlp.*": FP4Config(), "*.self_attn.*": Int8Config()})
    with pytest.raises(
        ValueError, match=r"self_attn\.q_proj is a Int8Linear; a folder of FP4 layers takes float layers"
    ):
        save_fp4_checkpoint(model, tmp_path)
    model = llama()
    quantize_(model, {"*.mlp.*": FP4Config(), "*.self_attn.*": FP4Config(format="mxfp4")})
    with pytest.raises(ValueError, match="layers with different settings"):
        save_fp4_checkpoint(model, tmp_path)


def test_gpt2_is_not_exported(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=256))
    quantize_(model, FP4Config())
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn was a Conv1D"):
        save_fp4_checkpoint(model, tmp_path)


def test_the_version_that_we_name_is_one_that_was_tested():
    pytest.importorskip("compressed_tensors")
    from eff_quant.fp4.settings import COMPRESSED_TENSORS

    assert compressed_tensors.__version__.split(".")[:2] == COMPRESSED_TENSORS.split(".")[:2]
