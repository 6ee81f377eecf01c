"""Folders and models that are damaged or that others could not use: refused, with the name of the layer."""

import json

import pytest
import torch
from eff_quant import FP4Config, Int8Config, load_fp4_checkpoint, quantize_, save_fp4_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

UP = "model.layers.0.mlp.up_proj"
STATIC, MXFP4 = FP4Config(activations="static"), FP4Config(format="mxfp4", scale_rounding="even", activations="dynamic")


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


def test_modelopt_without_input_scales_is_weight_only(tmp_path, fp4_model):
    model = fp4_model(STATIC)
    save_fp4_checkpoint(model, tmp_path, layout="modelopt")
    edit(tmp_path, lambda s: [s.pop(k) for k in list(s) if k.endswith("input_scale")])
    assert load_fp4_checkpoint(tmp_path).get_submodule(UP).config.activations is None
    edit(tmp_path, lambda s: s.update({f"{UP}.input_scale": torch.tensor(1.0)}))
    with pytest.raises(ValueError, match=f"{UP} has an input_scale, .* has none"):
        load_fp4_checkpoint(tmp_path)


def test_a_quantised_cache_is_not_passed_over_in_silence(tmp_path, fp4_model):
    model = fp4_model(FP4Config())
    save_fp4_checkpoint(model, tmp_path)
    settings(tmp_path, lambda s: s.update(kv_cache_scheme={"num_bits": 8, "type": "float"}))
    with pytest.warns(UserWarning, match="the cache of keys and values is not quantised, though the file says"):
        load_fp4_checkpoint(tmp_path)


@pytest.fixture
def folder(tmp_path, fp4_model):
    save_fp4_checkpoint(fp4_model(STATIC), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda s: s.pop(f"{UP}.weight_scale"), KeyError, f"{UP}: weight_packed without weight_scale"),
        (lambda s: s.pop(f"{UP}.weight_global_scale"), KeyError, f"{UP}: weight_packed without weight_global_scale"),
        (lambda s: s.pop(f"{UP}.input_global_scale"), KeyError, f"{UP}: no input_global_scale"),
        (lambda s: s.pop(f"{UP}.weight_packed"), KeyError, f"{UP}.weight_scale has no FP4 weight"),
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


def test_nan_bytes_of_mxfp4_are_an_error(tmp_path, fp4_model):
    save_fp4_checkpoint(fp4_model(FP4Config(format="mxfp4")), tmp_path)
    edit(tmp_path, nan_scale)
    with pytest.raises(ValueError, match=f"{UP}: weight_scale of row 4, block 1 is NaN"):
        load_fp4_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [5, 1000, 50_000])
def test_a_truncated_file_is_an_error_that_names_it(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        load_fp4_checkpoint(folder)


def test_a_missing_shard_is_an_error_that_names_it(tmp_path, fp4_model):
    save_fp4_checkpoint(fp4_model(FP4Config()), tmp_path, max_shard_size="60KB")
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
    with pytest.raises(OSError, match="nowhere is not a folder"):
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
    for config in (FP4Config(), MXFP4):
        quantize_(model := llama(), config)
        with pytest.raises(ValueError, match=r"ModelOpt's NVFP4 has nvfp4 weights and static activations, got"):
            save_fp4_checkpoint(model, tmp_path, layout="modelopt")
    model = llama()
    quantize_(model, {"*.mlp.*": FP4Config(), "*.self_attn.*": Int8Config()})
    with pytest.raises(ValueError, match=r"self_attn\.q_proj is a Int8Linear; layers of a folder must be FP4 or float"):
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


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=256,
    )
    return MixtralForCausalLM(config)


def test_stacked_experts_are_neither_exported_nor_loaded(tmp_path, folder):
    model = mixtral()
    quantize_(model, FP4Config(skip=("experts", "lm_head")))
    says = r"mlp\.experts\.gate_up_proj is a 3-D parameter .*; other libraries expect these in FP4, too"
    with pytest.raises(ValueError, match=says):
        save_fp4_checkpoint(model, tmp_path)
    quantize_(model, FP4Config())
    with pytest.raises(ValueError, match=r"mlp\.experts holds stacked experts in our own form, which a folder of FP4"):
        save_fp4_checkpoint(model, tmp_path)

    def add(s):
        for leaf in ("weight_packed", "weight_scale", "weight_global_scale"):
            s[f"model.layers.0.mlp.experts.0.w1.{leaf}"] = s[f"{UP}.{leaf}"].clone()

    edit(folder, add)
    with pytest.raises(ValueError, match=r"experts\.0\.w1 is quantised, and LlamaForCausalLM has no linear layer of"):
        load_fp4_checkpoint(folder)
