"""Every operation's folder is laid out alike (docs/architecture.md)."""

import re
from pathlib import Path

import eff_kernels
import pytest

FOLDERS = sorted(p.parent for p in Path(eff_kernels.__file__).parent.glob("ops/*/api.py"))


def imports(file, op):
    """The modules of its own folder that a file imports."""
    text = file.read_text()
    whole = re.findall(rf"from eff_kernels\.ops\.{op} import (.+)", text)
    names = [n.split(" as ")[0] for line in whole for n in line.split(", ")]
    return {*names, *re.findall(rf"from eff_kernels\.ops\.{op}\.(\w+) import", text)}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_arguments_are_listed_once(folder):
    texts = {f.name: f.read_text() for f in folder.glob("*.py")}
    ops = sum(len(re.findall(r"^\w+ = Op\($", t, re.M)) for t in texts.values())
    made = sum(t.count(" schema_of(") for t in texts.values())
    by_hand = 3 if folder.name == "neighborhood_attention" else 0  # unfused: two tensors and a window each
    assert ops - by_hand == made
    assert ("args.py" in texts) == (made > 0)
    assert "backward.py" not in texts
    assert ("autograd.py" in texts) == any("setup_context=" in t for t in texts.values())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_backends_import_neither_one_another_nor_the_reference(folder):
    backends = {f.stem for f in folder.glob("*.py") if f.stem in ("cpu", "triton", "unfused_cpu")} | {"reference"}
    for name in backends - {"reference"}:
        assert not imports(folder / f"{name}.py", folder.name) & (backends - {name})
