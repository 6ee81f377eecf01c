"""Peak memory of quantising and loading, each in a fresh process: at most 1.2 times the FP4 model."""

import json
import subprocess
import sys

import pytest
import torch
from eff_quant import FP4Config, calibrate_fp4, quantize_, save_fp4_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

MEASURE = """
import gc, json, os, re, sys
import eff_quant.hf, torch
from eff_quant import FP4Config, FP4Linear, load, load_fp4_checkpoint
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
    t.view(torch.uint8).view(-1)[::1024].sum()  # touch every page: what is only mapped counts too
print(json.dumps({
    "peak": status("VmHWM") - before,
    "size": sum(t.nbytes for t in tensors),
    "fp4": sum(isinstance(m, FP4Linear) for m in model.modules()),
}))
"""

WAYS = {
    "quantise while loading": "load('float', FP4Config())",
    "compressed-tensors": "load_fp4_checkpoint('compressed')",
    "modelopt": "load_fp4_checkpoint('modelopt')",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of 270 MB in bfloat16, in shards, and what became of it in FP4; in ``small`` the same in small."""
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
        for name, buffer in model.named_buffers():
            if name.endswith("inv_freq"):
                buffer.copy_(1 / 10000 ** (torch.arange(0, width // 16, 2) / (width // 16)))
        model.save_pretrained(where / "float", max_shard_size="60MB")
        ranges = calibrate_fp4(model, [{"input_ids": torch.arange(4)[None]}])
        quantize_(model, FP4Config(activations="static"))
        ranges.set_input_scales(model)
        save_fp4_checkpoint(model, where / "compressed", max_shard_size="20MB")
        save_fp4_checkpoint(model, where / "modelopt", layout="modelopt", max_shard_size="20MB")
    return path


@pytest.mark.parametrize("way", WAYS)
def test_loading_needs_little_more_than_the_fp4_model(folder, way):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, WAYS[way]], cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    float_size = sum(f.stat().st_size for f in (folder / "float").glob("*.safetensors"))
    assert seen["fp4"] == 8 * 7
    assert 0.25 * float_size < seen["size"] < 0.4 * float_size
    assert seen["peak"] <= 1.2 * seen["size"]
    assert seen["peak"] > 0.8 * seen["size"]  # or it would not have measured anything
