"""Each method and each property: it holds, or its error is the one that the row names."""

import pytest
from marks import MARKS
from method_table import ROOT, load_rows
from properties import PROPERTIES, asked

ROWS = load_rows()
CELLS = [pytest.param(row, name, id=f"{row.name}-{name}") for row in ROWS for name in asked(row)]
pytestmark = MARKS

NO_METHODS = {
    "eff_attention.hallucination": "scores of answers, without a model",
    "eff_guidance.training": "what losses in training share",
    "eff_vision.geometry": "formulas of cameras and panoramas",
    "eff_vision.metrics": "scores, without a model",
}


@pytest.mark.parametrize(("row", "name"), CELLS)
def test_method(row, name, tmp_path):
    wanted = row.cannot.get(name)
    if wanted is None:
        PROPERTIES[name](row, tmp_path)
        return
    with pytest.raises(Exception, match=wanted) as caught:
        PROPERTIES[name](row, tmp_path)
    assert not isinstance(caught.value, AssertionError), f"{row.name} gives wrong values instead of refusing {name}"


def test_rows_are_named_once_and_name_known_properties():
    assert len({row.name for row in ROWS}) == len(ROWS)
    known = {row.name: asked(row) for row in ROWS}
    assert [(row.name, n) for row in ROWS for n in row.cannot if n not in known[row.name]] == []
    assert [(row.name, n) for row in ROWS for n in row.absent if n not in PROPERTIES] == []


def test_every_method_of_every_package_has_a_row():
    found = set()
    for package in ("quant", "attention", "adapters", "guidance", "vision"):
        source = ROOT / f"packages/eff-{package}/src/eff_{package}"
        found |= {f"eff_{package}.{path.parent.name}" for path in source.glob("*/__init__.py")}
    rows = {f"{row.package.replace('-', '_')}.{row.name.split()[0]}" for row in ROWS}
    assert rows - {name for name in rows if name.startswith("eff_train.")} == found - set(NO_METHODS)
