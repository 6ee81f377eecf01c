"""Each class of models in each format holds what the table asks for, or refuses it with the text that stands there."""

import pytest
from class_page import PAGE, rendered
from class_table import FORMATS, STEPS, Cell, load_rows

# PEFT asks transformers for what that has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

for library in ("transformers", "diffusers", "peft"):
    pytest.importorskip(library)

ROWS = load_rows()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_cell(row, format, tmp_path):
    cell = Cell(row, format, tmp_path)
    for step in STEPS:
        if step == "generate" and row.prompt is None:
            continue
        if text := row.refusal(format, step):
            with pytest.raises((ValueError, TypeError), match=text):
                getattr(cell, step)()
        else:
            getattr(cell, step)()


def test_the_page_is_what_the_table_says():
    page = PAGE.read_text(encoding="utf-8")
    assert page == rendered(page, ROWS), "run `uv run packages/eff-quant/tests/classes/class_page.py`"


def test_there_are_enough():
    assert len({row.name for row in ROWS}) == len(ROWS) >= 30
    used = {format for row in ROWS for format, _ in row.cannot} - {"*"}
    assert used <= FORMATS.keys()
    assert {step for row in ROWS for _, step in row.cannot} <= set(STEPS)
