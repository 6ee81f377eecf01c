"""Peak memory of quantising and loading, each in a fresh process: at most 1.2 times the FP4 model."""

import sys

import pytest
import torch
from eff_quant import FP4Config, calibrate_fp4, quantize_, save_fp4_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

WAYS = {
    "quantise while loading": "load('float', FP4Config())",
    "compressed-tensors": "load_fp4_checkpoint('compressed')",
    "modelopt": "load_fp4_checkpoint('modelopt')",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, wide_llama):
    """A Llama of 270 MB in bfloat16, in shards, and what became of it in FP4; in ``small`` the same in small."""
    path = tmp_path_factory.mktemp("memory")
    for where, width in ((path, 1024), (path / "small", 128)):
        model = wide_llama(width)
        model.save_pretrained(where / "float", max_shard_size="60MB")
        ranges = calibrate_fp4(model, [{"input_ids": torch.arange(4)[None]}])
        quantize_(model, FP4Config(activations="static"))
        ranges.set_input_scales(model)
        save_fp4_checkpoint(model, where / "compressed", max_shard_size="20MB")
        save_fp4_checkpoint(model, where / "modelopt", layout="modelopt", max_shard_size="20MB")
    return path


@pytest.mark.parametrize("way", WAYS)
def test_loading_needs_little_more_than_the_fp4_model(folder, memory_of_loading, way):
    seen = memory_of_loading(folder, WAYS[way])
    float_size = sum(f.stat().st_size for f in (folder / "float").glob("*.safetensors"))
    assert seen["quantised"] == ["FP4Linear"] * 8 * 7
    assert 0.25 * float_size < seen["size"] < 0.4 * float_size
    assert seen["peak"] <= 1.2 * seen["size"]
    assert seen["peak"] > 0.8 * seen["size"]  # or it would not have measured anything
