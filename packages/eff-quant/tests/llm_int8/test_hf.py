"""The quantiser inside transformers: quantise while loading, save, load again, and what goes wrong."""

import json
import subprocess
import sys

import eff_quant.hf
import pytest
import torch
from eff_quant import Int8Config, Int8Linear, dequantize_, load, quantize_
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

COLUMNS = {"model.layers.0.mlp.down_proj": (3, 77), "model.layers.1.self_attn.q_proj": (0,)}
CONFIGS = [
    Int8Config(),
    Int8Config(threshold=0.0),
    Int8Config(threshold=2.0, per_token_outliers=True),
    Int8Config(activation="none", out_dtype=torch.bfloat16),
    Int8Config(skip=("lm_head", "*.mlp.*")),
    Int8Config(outlier_weights="original", outlier_columns=COLUMNS),
]


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def folder(llama, tmp_path):
    llama(torch.bfloat16).save_pretrained(tmp_path / "float", max_shard_size="50KB")
    return tmp_path / "float"


@pytest.mark.parametrize("wrap", [lambda c: c, eff_quant.hf.EffConfig], ids=["Int8Config", "EffConfig"])
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_quantised_while_loading_saved_and_loaded_again(folder, tmp_path, ids, llama, config, wrap):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=wrap(config), output_loading_info=True
    )
    assert not any(info.values())
    other = llama(torch.bfloat16)
    report = quantize_(other, config)
    same_state(model, other)
    assert [e.name for e in model.hf_quantizer.report.changed] == [e.name for e in report.changed]
    expected = model(ids).logits
    assert torch.equal(other(ids).logits, expected)
    model.save_pretrained(tmp_path / "int8", max_shard_size="50KB")
    assert len(list((tmp_path / "int8").glob("*.safetensors"))) > 1
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path / "int8"), load(tmp_path / "int8")):
        same_state(again, model)
        assert torch.equal(again(ids).logits, expected)
        assert again.model.layers[0].self_attn.q_proj.config.threshold == config.threshold
    assert torch.equal(load(folder, config)(ids).logits, expected)


def test_a_model_that_was_quantised_in_place_saves_just_as_well(llama, tmp_path, ids):
    model = llama()
    quantize_(model, Int8Config(threshold=3.0), where="*.mlp.*")
    assert model.config.quantization_config.settings.skip[1:] == tuple(
        rf"re:model\.layers\.{i}\.self_attn\.{p}_proj" for i in (0, 1) for p in "qkvo"
    )
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    same_state(again, model)
    assert torch.equal(again(ids).logits, model(ids).logits)
    dequantize_(again)
    again.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "float")(ids).logits, again(ids).logits)


def test_layers_with_different_settings_share_a_checkpoint(llama, tmp_path, ids):
    model = llama()
    quantize_(model, Int8Config(threshold=3.0), where="*.mlp.*")
    quantize_(model, Int8Config(threshold=6.0))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "eff_mixed"
    again = load(tmp_path)
    same_state(again, model)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.model.layers[1].mlp.up_proj.config.threshold == 3.0
    base = load_base(tmp_path)  # the class without the head has other names for the same layers
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def load_base(path):
    from transformers import AutoModel

    return AutoModel.from_pretrained(path)


def test_transformers_own_dequantize(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Int8Config(activation="none"))
    y = model(ids).logits
    model = model.dequantize()
    assert not any(isinstance(m, Int8Linear) for m in model.modules())
    assert (model(ids).logits - y).abs().max() < 0.02 * y.abs().max()


def test_generation_goes_on_as_before(folder, ids):
    model = load(folder, Int8Config(threshold=0.0))
    whole = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    step = ids
    for _ in range(8):
        step = torch.cat([step, model(step, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(whole, step)


@pytest.mark.parametrize("kind", ["gpt2", "t5", "mixtral"])
def test_other_architectures(kind, tmp_path):
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        MixtralConfig,
        MixtralForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    ids = torch.arange(12)[None]
    if kind == "gpt2":  # Conv1D, tied head
        config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, bos_token_id=1, eos_token_id=2)
        model, count = GPT2LMHeadModel(config), 8
    elif kind == "t5":  # tied embeddings, and `wo` is kept in float32
        config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2, vocab_size=64)
        model, count = T5ForConditionalGeneration(config), 14
    else:  # stacked experts
        config = MixtralConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=64,
            num_local_experts=4,
        )
        model, count = MixtralForCausalLM(config), 5
    inputs = {"input_ids": ids} if kind != "t5" else {"input_ids": ids, "decoder_input_ids": ids}
    model = model.eval()
    before = model(**inputs).logits
    model.save_pretrained(tmp_path / "float")
    loaded = load(tmp_path / "float", Int8Config())
    assert len(loaded.hf_quantizer.report.changed) == count
    y = loaded(**inputs).logits
    assert 0 < (y - before).abs().max() < 0.05 * before.abs().max()
    loaded.save_pretrained(tmp_path / "int8")
    assert torch.equal(load(tmp_path / "int8")(**inputs).logits, y)
    quantize_(model, Int8Config())  # takes what from_pretrained keeps in float32
    y = model(**inputs).logits
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(load(tmp_path / "whole")(**inputs).logits, y)


def rewrite(folder, change):
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


@pytest.fixture
def int8_folder(llama, tmp_path):
    model = llama()
    quantize_(model, Int8Config())
    model.save_pretrained(tmp_path / "int8")
    return tmp_path / "int8"


def test_missing_scales_name_the_module(int8_folder):
    rewrite(int8_folder, lambda state: state.pop("model.layers.1.mlp.up_proj.SCB"))
    with pytest.raises(KeyError, match=r"model\.layers\.1\.mlp\.up_proj: int8 weight without its scales"):
        load(int8_folder)


def test_a_float_weight_in_an_int8_checkpoint_is_an_error(int8_folder):
    def change(state):
        state["model.layers.1.mlp.up_proj.weight"] = state["model.layers.1.mlp.up_proj.weight"].float()

    rewrite(int8_folder, change)
    with pytest.raises(TypeError, match=r"layers\.1\.mlp\.up_proj: weight has dtype torch\.float32, wanted int8"):
        load(int8_folder)


def test_the_checkpoint_says_what_is_quantised_in_it(int8_folder):
    """A skip list that does not fit, because it was written for another class, is no reason to pass over codes."""
    before = load(int8_folder)
    file = int8_folder / "config.json"
    settings = json.loads(file.read_text())
    settings["quantization_config"]["skip"].append("model.layers.1.mlp.up_proj")
    file.write_text(json.dumps(settings))
    same_state(load(int8_folder), before)


def test_load_says_what_it_needs(folder, int8_folder):
    with pytest.raises(ValueError, match=r"holds float weights; give a config"):
        load(folder)
    with pytest.raises(ValueError, match="quantised already"):
        load(int8_folder, Int8Config())
    file = int8_folder / "config.json"
    file.write_text(file.read_text().replace("eff_int8", "awq"))
    with pytest.raises(ValueError, match="quantised by 'awq'"):
        load(int8_folder)


def test_disk_offload_is_refused(folder):
    with pytest.raises(ValueError, match="device_map puts modules on 'disk'"):
        load(folder, Int8Config(), device_map={"model": "cpu", "lm_head": "disk"})


@pytest.mark.slow
def test_without_our_import_transformers_warns(int8_folder):
    """What the documentation says: without eff_quant the folder must not be used."""
    code = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(int8_folder)!r})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert "Unknown quantization type, got eff_int8" in out.stderr
    assert "SCB" in out.stderr  # listed as unexpected
