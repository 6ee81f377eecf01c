"""What a person reads first agrees with the code: versions, and the lists of what exists."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

METHODS = ["eff-adapters", "eff-attention", "eff-guidance", "eff-quant", "eff-vision"]


def test_version(member):
    assert importlib.import_module(member.module).__version__ == member.project["version"]


@pytest.mark.parametrize("name", METHODS)
def test_docstring_names_every_sub_package(name, all_members):
    member = next(m for m in all_members if m.name == name)
    text = importlib.import_module(member.module).__doc__
    folders = [Path(p).parent.name for p in member.source.glob("*/__init__.py")]
    assert [f for f in folders if f"`{f}`" not in text] == []


def test_tables_agree_with_the_code(root):
    subprocess.run([sys.executable, "tools/front_tables.py", "--check"], cwd=root, check=True)


def test_every_page_of_a_method_is_in_the_table(root):
    table = tomllib.loads((root / "tools" / "methods.toml").read_text())
    named = {entry["page"] for entries in table.values() for entry in entries.values()}
    listings = {"quantised-classes", "table"}
    assert {p.stem for p in (root / "docs" / "methods").glob("*.md")} - listings == named
