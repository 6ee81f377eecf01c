"""What `import eff_quant` loads, in a fresh process (one for all: starting it takes most of the time)."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import eff_quant
import pytest

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


SOURCES = Path(eff_quant.__file__).parent
METHODS = sorted(p.parent.name for p in SOURCES.glob("*/config.py"))
LOAD_A_LIBRARY = {"hf", "diffusion", "triton", "plot"}  # transformers, diffusers, triton, matplotlib


def imported(node):
    """Modules of the package that a statement may import, as the names of their parts."""
    if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("eff_quant"):
        return set()
    parts = tuple(node.module.split(".")[1:])
    inside = {(*parts, a.name) for a in node.names if SOURCES.joinpath(*parts, f"{a.name}.py").exists()}
    return inside or {parts}


@pytest.mark.parametrize("file", ["hf", "checkpoint", "hub", "plan", "convert", "diffusion", "layer"])
def test_what_all_methods_share_knows_none_by_name(file):
    assert {"llm_int8", "fp4", "fp8_qat", "quantvla"} <= set(METHODS)
    names = set()
    for node in ast.walk(ast.parse((SOURCES / f"{file}.py").read_text())):
        names |= {part for parts in imported(node) for part in parts}
        names |= {getattr(node, field, None) for field in ("id", "attr")}
    classes = {f"{kind}{what}" for kind in ("Int8", "FP4", "FP8", "W4A8") for what in ("Config", "Linear")}
    assert not names & {*METHODS, *classes}


def test_only_what_loads_a_library_is_imported_in_functions():
    found = set()
    for path in SOURCES.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                found |= {parts[-1] for node in ast.walk(function) for parts in imported(node)}
    assert found == LOAD_A_LIBRARY
