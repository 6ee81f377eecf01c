"""The planter of faults plants what it says, and its lists fit the sources."""

import ast
import importlib
import random
import sys

import pytest


@pytest.fixture(scope="module")
def tool(root):
    sys.path.insert(0, str(root / "tools" / "faults"))
    try:
        yield importlib.import_module("plant")
    finally:
        sys.path.remove(str(root / "tools" / "faults"))


SOURCE = '''
def f(x, y, mask):
    """Text with 1 < 2 stays."""
    if x < 3 and mask is not None:
        y = x.clone()
        y += 1
    x.copy_(y.sum(dim=1, keepdim=True))
    return -x @ y * 0.5
'''


def test_faults_in_python(tool):
    found = {(f.kind, SOURCE[f.start : f.end], f.new) for f in tool.kinds.in_python(SOURCE)}
    assert {
        ("comparison", "<", "<="),
        ("comparison", "is not", "is"),
        ("logic", "and", "or"),
        ("constant", "3", "4"),
        ("constant", "0.5", "0.75"),
        ("flag", "True", "False"),
        ("missing clone", "x.clone()", "x"),
        ("dropped statement", "y += 1", "pass"),
        ("dropped statement", "x.copy_(y.sum(dim=1, keepdim=True))", "pass"),
        ("no dim", "dim=1, ", ""),
        ("sign", "-x", "x"),
        ("arithmetic", "*", "/"),
        ("operands", "-x @ y", "y @ -x"),
    } <= found
    assert not any("stays" in SOURCE[f.start : f.end] for f in tool.kinds.in_python(SOURCE))


def test_faults_in_c(tool):
    head = "#define N 4\n/* 5 < 6 */\nint f(int a, int b) {\n"
    text = head + "  for (int i = 0; i < 7; i++)\n    a += b * i;\n  return a;\n}\n"
    found = {(f.kind, text[f.start : f.end], f.new) for f in tool.kinds.in_c(text)}
    assert found == {
        ("comparison", "<", "<="),
        ("arithmetic", "*", "/"),
        ("constant", "0", "1"),
        ("constant", "7", "8"),
        ("dropped statement", "a += b * i;", ";"),
    }


def test_faults_are_python_and_the_same_for_a_seed(tool, root):
    draw = random.Random(0)
    for unit in draw.sample(tool.units.units(root), 12):
        planted = tool.sample(root, unit, 4, seed=0)
        assert planted == tool.sample(root, unit, 4, seed=0)
        for fault in planted:
            text = (root / fault.path).read_text()
            assert fault.text != text
            assert fault.before != fault.after
            if fault.path.endswith(".py"):
                ast.parse(fault.text)


def test_units_have_sources_and_tests(tool, root):
    for unit in tool.units.units(root):
        assert unit.sources, unit.label
        assert unit.tests, unit.label
        assert all((root / path).exists() for path in (*unit.sources, *unit.tests)), unit.label


def test_every_c_source_of_an_op_belongs_to_it(tool, root):
    found = {path for unit in tool.units.units(root) for path in unit.sources}
    native = (root / tool.units.NATIVE).glob("*.c")
    of_all = {"parallel.c", "scratch.c", "self_test.c", "tape.c", "tiles.c"}
    assert {p.name for p in native if str(p.relative_to(root)) not in found} == of_all


def test_faults_by_hand_stand_in_the_sources_or_in_the_record(tool, root):
    planted = {(r["package"], r["unit"], r.get("path"), r["kind"]) for r in tool.records().values()}
    for package, units in tool.tomllib.loads(tool.BY_HAND.read_text()).items():
        for unit, wishes in units.items():
            for wish in wishes:
                there = (root / wish["file"]).read_text().count(wish["old"]) if (root / wish["file"]).exists() else 0
                assert there == 1 or (package, unit, wish["file"], wish["kind"]) in planted, wish


def test_each_verdict_is_about_a_survivor(tool):
    survivors = {r["key"] for r in tool.history() if r["outcome"] == tool.SURVIVED}
    verdicts = tool.tomllib.loads(tool.VERDICTS.read_text())
    assert set(verdicts) <= survivors
    assert {v["verdict"] for v in verdicts.values()} <= {"equivalent", "mended", "open"}
    assert all(v["why"] for v in verdicts.values())


def test_the_page_shows_the_record(tool):
    assert tool.PAGE.read_text() == tool.page()
