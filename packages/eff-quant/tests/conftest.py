"""Tiny models of real architecture classes, made anew for each test."""

import contextlib
import importlib
import json
import subprocess
import sys
import warnings

import pytest
import torch

# Importing these warns about their own dependencies (deprecations), which is nothing that a test here is about.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in ("transformers", "transformers.models.auto", "bitsandbytes", "peft"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
            if name == "transformers":
                sys.modules[name].LlamaForCausalLM  # noqa: B018 - the import behind it is made on first use
                sys.modules[name].utils.logging.disable_progress_bar()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Skip what this transformers is too old for, as eff_quant says."""
    try:
        return (yield)
    except NotImplementedError as error:
        if "changes the names of stored experts" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture
def llama():
    """A function that makes a Llama of two layers, 64 wide, with the same random weights each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(dtype=torch.float32, **changes):
        torch.manual_seed(1)
        values = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 256,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
        }
        return LlamaForCausalLM._from_config(LlamaConfig(**{**values, **changes}), dtype=dtype).eval()

    return make


@pytest.fixture
def ids():
    """Two sequences of twelve tokens."""
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def wide_llama():
    """``wide_llama(width)``: a Llama of eight layers in bfloat16, 270 MB at 1024, filled fast and in little memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(width):
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
        return model

    return make


MEASURE = """
import gc, json, os, re, sys
import eff_quant.hf, torch
from eff_quant import FP4Config, Int8Config, load, load_fp4_checkpoint
from eff_quant.layer import QuantizedLinear
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
    "quantised": [type(m).__name__ for m in model.modules() if isinstance(m, QuantizedLinear)],
    "dtype": str(model.dtype),
}))
"""


@pytest.fixture(scope="session")
def memory_of_loading():
    """``memory_of_loading(folder, way)``: what an expression that loads from a folder took and gave, run by itself.

    The same is loaded from ``small`` in the folder before, so that what is imported on the way does not count.
    """

    def measure(folder, way):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, way], cwd=folder, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return measure
