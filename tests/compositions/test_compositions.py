"""Each pair of methods, and some stacks of more: they hold together, or the pair is refused with its text."""

import pytest
import torch
from composing import PROMISES, UNDONE, Stack, acts, check, stored_is_float
from families import FAMILIES, STACKS
from marks import MARKS

PAIRS = [pytest.param(f, pair, id=f"{f.name}: {' + '.join(pair)}") for f in FAMILIES.values() for pair in f.pairs()]
WIDER = [pytest.param(f, names, id=f"{f.name}: {' + '.join(names)}") for f, names in STACKS]
pytestmark = MARKS


@pytest.mark.parametrize(("family", "pair"), PAIRS)
def test_pair(family, pair):
    names = list(family.parts)
    # The other way round the same is computed: what may differ is undoing, and what is stored.
    promises = PROMISES if names.index(pair[0]) < names.index(pair[1]) else (stored_is_float, *UNDONE)
    if pair in family.apart:
        promises = (acts, stored_is_float)
    wanted = family.refusals.get(pair) or family.held.get(pair)
    if wanted is None:
        check(family, pair, promises)
        return
    with pytest.raises(Exception, match=wanted) as caught:
        check(family, pair)
    assert not isinstance(caught.value, AssertionError), f"{pair} go wrong together instead of being refused"


@pytest.mark.parametrize(("family", "names"), WIDER)
def test_stack(family, names):
    check(family, names)


@pytest.mark.parametrize(
    ("family", "pair"), [pytest.param(f, pair, id=" + ".join(pair)) for f in FAMILIES.values() for pair in f.refusals]
)
def test_what_is_refused_leaves_the_first_as_it_was(family, pair):
    """Refused while it is applied: nothing is left half done."""
    first, second = (family.parts[name] for name in pair)
    stack = Stack(family, [first])
    before = stack.run()
    try:
        second.apply(stack.model)
    except Exception:
        assert torch.equal(stack.run(), before)
    else:
        pytest.skip("is refused when the model runs")


def test_tables_name_known_pairs():
    for family in FAMILIES.values():
        assert {*family.refusals, *family.held, *family.apart} <= set(family.pairs())
