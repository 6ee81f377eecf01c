"""Who imports whom: what an import loads, which dependencies are declared, which way imports go."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

LIBRARIES = ["eff_adapters", "eff_attention", "eff_embedded", "eff_guidance", "eff_kernels", "eff_quant", "eff_vision"]
HEAVY = [
    "transformers",
    "diffusers",
    "triton",
    "bitsandbytes",
    "peft",
    "accelerate",
    "torchao",
    "timm",
    "natten",
    "fastapi",
    "pytest",
    "sklearn",
    "skimage",
    "onnx",
    "matplotlib",
]


@pytest.mark.parametrize("module", LIBRARIES)
def test_import_loads_nothing_heavy(module, run_python, all_members):
    source = next(m.source for m in all_members if m.module == module)
    methods = [p.parent.name for p in sorted(source.glob("*/__init__.py")) if p.parent.name != "testing"]
    code = f"""
        import importlib, sys
        import torch
        before = set(sys.modules)
        for name in {[module, *(f"{module}.{m}" for m in methods)]!r}:
            importlib.import_module(name)
        loaded = set(sys.modules) - before
        print("loaded:", sorted(name for name in {HEAVY!r} if name in loaded))
    """
    assert run_python(re.sub("^ {8}", "", code, flags=re.M)).splitlines()[-1] == "loaded: []"


def imports(path: Path) -> Iterator[str]:
    """Yield each absolutely imported top-level name of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def requirement_name(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


def undeclared(source: Path, project: dict, distributions: dict[str, list[str]]) -> list[str]:
    """Imports that neither the required dependencies nor an extra cover.

    That no import of the package itself needs an extra is what `test_import_loads_nothing_heavy` shows.
    """
    extras = project.get("optional-dependencies", {}).values()
    declared = {requirement_name(r) for rs in (project["dependencies"], *extras) for r in rs}
    missing = []
    for path in sorted(source.rglob("*.py")):
        for name in imports(path):
            if name in sys.stdlib_module_names or name == source.name:
                continue
            if not declared & {d.lower().replace("_", "-") for d in distributions.get(name, [name])}:
                missing.append(f"{path.relative_to(source.parent)}: {name}")
    return missing


@pytest.fixture(scope="module")
def distributions() -> dict[str, list[str]]:
    # pydantic-core is pydantic's own half, released with it.
    return {name: list(ds) for name, ds in packages_distributions().items()} | {"pydantic_core": ["pydantic"]}


def test_imports_are_declared(member, distributions):
    assert undeclared(member.source, member.project, distributions) == []


def test_undeclared_import_is_found(tmp_path, distributions):
    source = tmp_path / "eff_demo"
    source.mkdir()
    (source / "a.py").write_text("import torch\nimport rich\ndef f():\n    import rich.table\n    import numpy\n")
    project = {"dependencies": ["torch>=2"], "optional-dependencies": {"tables": ["rich"]}}
    assert undeclared(source, project, distributions) == ["eff_demo/a.py: numpy"]


VIOLATIONS = {
    "none": ("eff_quant", "import eff_kernels\n", 0),
    "kernels import methods": ("eff_kernels", "import eff_quant\n", 1),
    "methods import each other": ("eff_attention", "import eff_quant\n", 1),
    "method imports app in a function": ("eff_quant", "def f():\n    import eff_serve\n", 1),
    "kernels import a model library in a function": (
        "eff_kernels",
        "def f():\n    from transformers import AutoModel\n",
        1,
    ),
    "a method imports the data": ("eff_vision", "import eff_embedded\n", 1),
    "what servers share imports a server": ("eff_http", "import eff_serve\n", 1),
    "recipes import what they train": ("eff_train", "import eff_serve, eff_vision, eff_embedded\n", 0),
}


@pytest.mark.parametrize("case", VIOLATIONS)
def test_import_contracts_can_fail(case, root, tmp_path, all_members):
    where, code, expected = VIOLATIONS[case]
    for m in all_members:
        (tmp_path / m.module).mkdir()
        (tmp_path / m.module / "__init__.py").write_text(code if m.module == where else "")
    shutil.copy(root / "pyproject.toml", tmp_path)
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [tool, "--no-cache"], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == expected, done.stdout + done.stderr


def test_every_member_is_under_the_import_contracts(root, all_members):
    listed = re.search(r"root_packages = \[(.*?)\]", (root / "pyproject.toml").read_text(), re.S)[1]
    assert set(re.findall(r'"(\w+)"', listed)) == {m.module for m in all_members}
