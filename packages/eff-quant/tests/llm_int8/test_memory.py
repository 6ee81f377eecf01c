"""Peak memory of loading a sharded checkpoint, each way in a fresh process: at most 1.2 times the int8 model."""

import json
import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

MEASURE = """
import gc, json, os, re, sys
import eff_quant.hf, torch
from eff_quant import Int8Config, Int8Linear, load
from transformers import AutoModelForCausalLM, LlamaForCausalLM, models

def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

models.auto, LlamaForCausalLM  # these are imported when they are first asked for
os.chdir("small")  # so are some that loading asks for: none of that is the model's
eval(sys.argv[1])
os.chdir("..")
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the imports
before = status("VmRSS")
model = eval(sys.argv[1])
tensors = [*model.parameters(), *model.buffers()]
for t in tensors:
    t.view(-1)[:: max(1, 1024 // t.element_size())].sum()  # touch every page: what is only mapped counts too
print(json.dumps({
    "peak": status("VmHWM") - before,
    "size": sum(t.nbytes for t in tensors),
    "int8": sum(isinstance(m, Int8Linear) for m in model.modules()),
    "dtype": str(model.dtype),
}))
"""

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
def folder(tmp_path_factory):
    """A Llama of 270 MB in bfloat16, in shards, and what became of it in int8; in ``small`` the same in small."""
    from eff_quant import Int8Config, quantize_, save_bnb_int8
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("memory")
    for where, width in ((path, 1024), (path / "small", 128)):
        config = LlamaConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=8, num_attention_heads=16, vocab_size=4000
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        noise = torch.randn(4096 * 1024).to(torch.bfloat16)
        for p in model.parameters():
            p.data.copy_(noise.repeat(-(-p.numel() // len(noise)))[: p.numel()].view_as(p))
        model.save_pretrained(where / "float", max_shard_size="60MB")
        quantize_(model, Int8Config(activation_group=None))
        model.save_pretrained(where / "int8", max_shard_size="30MB")
        save_bnb_int8(model, where / "bnb", max_shard_size="30MB")
    for name in ("float", "int8", "bnb"):
        assert len(list((path / name).glob("*.safetensors"))) >= 5
    return path


@pytest.mark.parametrize("way", WAYS)
def test_loading_needs_little_more_than_the_int8_model(folder, way):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, WAYS[way]], cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    float_size = sum(f.stat().st_size for f in (folder / "float").glob("*.safetensors"))
    assert seen["int8"] == 8 * 7
    assert seen["dtype"] == ("torch.float16" if "other dtype" in way else "torch.bfloat16")
    assert 0.5 * float_size < seen["size"] < 0.55 * float_size
    assert seen["peak"] <= 1.2 * seen["size"]
    assert seen["peak"] > 0.8 * seen["size"]  # or it would not have measured anything
