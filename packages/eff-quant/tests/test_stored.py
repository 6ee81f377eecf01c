"""What ``quantization_config`` of a folder means, for every way of storing weights that is read."""

import pytest
from eff_quant import FP4Config, FP8Config, Int8Config, MixedConfig
from eff_quant.fp4.settings import compressed_tensors_settings
from eff_quant.int4_files import Int4File
from eff_quant.mixed import as_mixed
from eff_quant.stored import stored_as

MIXED = MixedConfig((("*.mlp.*", FP8Config()), ("*", Int8Config(threshold=0.0))))
FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False},
        }
    },
}


@pytest.mark.parametrize("config", [Int8Config(threshold=3.0), FP4Config(format="mxfp4"), FP8Config(), MIXED])
def test_our_own_settings_come_back(config):
    assert stored_as(config.to_dict()) == as_mixed(config)


def test_floats_are_nothing():
    assert stored_as(None) is None
    assert stored_as({}) is None


def test_bitsandbytes_rounds_whole_rows_with_its_own_threshold():
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 4.0}
    assert stored_as(settings) == as_mixed(Int8Config(threshold=4.0, activation_group=None))


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_fp4_of_compressed_tensors(format):
    settings = compressed_tensors_settings(FP4Config(format=format), ("lm_head",))
    rounding = "even" if format == "mxfp4" else "floor"
    assert stored_as(settings) == as_mixed(FP4Config(format=format, activations=None, scale_rounding=rounding))


def test_fp8_of_compressed_tensors():
    assert stored_as(FP8) == as_mixed(FP8Config(activations="none", skip=()))


def test_groups_of_four_bits():
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    assert stored_as(gptq) == Int4File("gptq", 128, zeros_are_less=True)
    assert stored_as({"quant_method": "awq", "bits": 4, "group_size": 32}) == Int4File("awq", 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq", "bits": 4}, "'hqq' is not one of eff_mixed"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes' is not one of"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "use load_fp4_checkpoint"),
        ({"quant_method": "gptq", "bits": 3}, "3 bits"),
    ],
)
def test_what_is_not_read_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        stored_as(settings)
