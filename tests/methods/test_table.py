"""Each method and each property: it holds, or its error is the one that the row names."""

import pytest
import torch
from method_table import PROPERTIES, load_rows

ROWS = load_rows()
# transformers and PEFT rename and deprecate from release to release; what they compute is looked at here.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
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
    assert [(row.name, n) for row in ROWS for n in row.cannot if n not in PROPERTIES] == []
