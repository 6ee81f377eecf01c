"""Peak memory of loading a sharded checkpoint, each way in a fresh process: at most 1.2 times the int8 model."""

import sys

import pytest
from eff_quant import Int8Config, quantize_, save_bnb_int8

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

WAYS = {
    "transformers": "AutoModelForCausalLM.from_pretrained('float', quantization_config=Int8Config())",
    "transformers, other dtype": (
        "AutoModelForCausalLM.from_pretrained('float', quantization_config=Int8Config(), dtype=torch.float16)"
    ),
    "load": "load('float', Int8Config())",
    "load, on a device": "load('float', Int8Config(), device_map='cpu')",
    "load int8": "load('int8')",
    "load bitsandbytes": "load('bnb')",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, wide_llama):
    """A Llama of 270 MB in bfloat16, in shards, and what became of it in int8; in ``small`` the same in small."""
    path = tmp_path_factory.mktemp("memory")
    for where, width in ((path, 1024), (path / "small", 128)):
        model = wide_llama(width)
        model.save_pretrained(where / "float", max_shard_size="60MB")
        quantize_(model, Int8Config(activation_group=None))
        model.save_pretrained(where / "int8", max_shard_size="30MB")
        save_bnb_int8(model, where / "bnb", max_shard_size="30MB")
    for name in ("float", "int8", "bnb"):
        assert len(list((path / name).glob("*.safetensors"))) >= 5
    return path


@pytest.mark.parametrize("way", WAYS)
def test_loading_needs_little_more_than_the_int8_model(folder, memory_of_loading, way):
    seen = memory_of_loading(folder, WAYS[way])
    float_size = sum(f.stat().st_size for f in (folder / "float").glob("*.safetensors"))
    assert seen["quantised"] == ["Int8Linear"] * 8 * 7
    assert seen["dtype"] == ("torch.float16" if "other dtype" in way else "torch.bfloat16")
    assert 0.5 * float_size < seen["size"] < 0.55 * float_size
    assert seen["peak"] <= 1.2 * seen["size"]
    assert seen["peak"] > 0.8 * seen["size"]  # or it would not have measured anything
