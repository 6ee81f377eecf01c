"""Offsets that grow with the number of programs have 64 bits: 32 overflow from 2**31 elements on, beyond any test."""

import ast
from pathlib import Path

import eff_kernels
import pytest

OPS = Path(eff_kernels.__file__).parent / "ops"
# Products of a program's number that stay small.
SMALL = {
    ("grouped_lora/triton.py", "tl.program_id(2) * chunk"),  # within one row
    ("rms_norm/triton.py", "tl.program_id(0) * d"),  # as many programs as run at once
}


def narrow_products(text):
    """Products of ``tl.program_id`` in 32 bits with what is known at run time alone."""
    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, ast.FunctionDef):
            continue
        nodes = list(ast.walk(function))
        names = {t.id for n in nodes if isinstance(n, ast.Assign) and is_number(n.value) for t in n.targets}
        for n in nodes:
            if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Mult):
                for a, b in ((n.left, n.right), (n.right, n.left)):
                    fixed = isinstance(b, ast.Constant) or (isinstance(b, ast.Name) and b.id.isupper())
                    if (is_number(a) or (isinstance(a, ast.Name) and a.id in names)) and not fixed:
                        yield ast.unparse(n)


def is_number(node):
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.program_id"


@pytest.mark.parametrize("path", sorted(str(p.relative_to(OPS)) for p in OPS.glob("*/triton*.py")))
def test_offsets_of_programs_are_wide(path):
    found = {(path, product) for product in narrow_products((OPS / path).read_text())}
    assert found <= SMALL


def test_narrow_products_are_found():
    text = "def f():\n    row = tl.program_id(0){}\n    g(row * stride, row * BLOCK, 2 * row)"
    assert list(narrow_products(text.format(""))) == ["row * stride"]
    assert list(narrow_products(text.format(".to(tl.int64)"))) == []
