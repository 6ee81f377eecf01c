"""What `import eff_quant` loads, in a fresh process (one for all: starting it takes most of the time)."""

import json
import subprocess
import sys

HEAVY = ("transformers", "triton", "bitsandbytes", "peft", "accelerate", "safetensors")

CODE = f"""
import json, sys
import eff_quant
loaded = [m for m in {HEAVY} if m in sys.modules]
sys.modules["transformers"] = sys.modules["bitsandbytes"] = None  # as if they were not installed
import torch
errors = []
for call in (lambda: __import__("eff_quant.hf"), lambda: eff_quant.load("."),
             lambda: eff_quant.convert_from_bnb_(torch.nn.ReLU())):
    try:
        call()
    except ImportError as error:
        errors.append(str(error))
print(json.dumps([loaded, errors]))
"""


def test_it_loads_no_model_library_and_names_what_is_missing():
    out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=240, check=False)
    assert out.returncode == 0, out.stderr
    loaded, errors = json.loads(out.stdout.splitlines()[-1])
    assert loaded == []
    need = "eff_quant.hf needs transformers 5: pip install 'eff-quant[transformers]'"
    assert errors == [need, need, "convert_from_bnb_ needs bitsandbytes: pip install bitsandbytes"]
