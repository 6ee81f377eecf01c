"""Several settings in one model: which rule a layer gets, and the way through a file."""

import pytest
import torch
from eff_quant import Int8Config, Int8Linear, MixedConfig, load, quantize_
from eff_quant.mixed import as_mixed

COARSE, FINE = Int8Config(threshold=0.0), Int8Config(activation="none")


def test_the_first_pattern_that_fits_decides_and_other_layers_stay(llama, ids):
    model = llama()
    report = quantize_(model, {"*.1.mlp.*": FINE, "mlp.*": COARSE, "*.mlp.*": COARSE})
    chosen = {n: m.config for n, m in model.named_modules() if isinstance(m, Int8Linear)}
    assert {n for n, c in chosen.items() if c == FINE} == {
        f"model.layers.1.mlp.{p}_proj" for p in ("up", "gate", "down")
    }
    assert len(chosen) == len(report.changed) == 6
    assert {e.reason for e in report.skipped} == {"no rule takes it in"}


def test_each_rule_has_its_own_skip_list(llama):
    report = quantize_(llama(), {"*.self_attn.*": Int8Config(skip=("q_proj",)), "*": Int8Config(skip=("lm_head",))})
    assert {e.name.rpartition(".")[2] for e in report.skipped} == {"q_proj", "lm_head"}


def test_a_mixed_model_is_saved_and_loaded_bit_for_bit(llama, ids, tmp_path):
    config = {"*.mlp.*": FINE, "*": COARSE}
    model = llama(torch.bfloat16)
    model.save_pretrained(tmp_path / "float")
    quantize_(model, config)
    expected = model(ids).logits
    assert torch.equal(load(tmp_path / "float", config)(ids).logits, expected)
    model.save_pretrained(tmp_path / "mixed")
    again = load(tmp_path / "mixed")
    assert torch.equal(again(ids).logits, expected)
    assert again.model.layers[0].mlp.up_proj.config.activation == "none"


def test_it_travels_as_json():
    config = as_mixed({"q_proj": FINE, "*": COARSE})
    assert MixedConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"has no \['layers'\]"):
        MixedConfig.from_dict({**config.to_dict(), "layers": []})
    with pytest.raises(ValueError, match="version 2"):
        MixedConfig.from_dict({**config.to_dict(), "version": 2})
    with pytest.raises(ValueError, match="no quantisation method 'eff_int3'"):
        MixedConfig.from_dict({"rules": [{"where": ["*"], "config": {"quant_method": "eff_int3"}}]})


def test_rules_that_say_nothing_are_errors():
    with pytest.raises(ValueError, match="at least one rule"):
        MixedConfig(())
    with pytest.raises(ValueError, match="has no patterns"):
        MixedConfig((((), FINE),))
    with pytest.raises(TypeError, match="no quantisation method for a str"):
        MixedConfig((("*", "int8"),))
