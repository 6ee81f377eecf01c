"""What collage diffusion is trained on: prompts say what the pictures hold."""

from __future__ import annotations

import numpy as np
import pytest
from eff_embedded.collages import find, things
from eff_embedded.diffusion import GROUNDS, OBJECTS, example

EXAMPLES = [example(seed) for seed in range(60)]


def test_objects_are_of_the_vocabulary_and_differ() -> None:
    """Thirty-six names that collages know."""
    assert len(set(OBJECTS)) == len(OBJECTS) == 36
    assert set(OBJECTS) <= set(things())


def test_prompts_name_exactly_what_is_there() -> None:
    """Every object is named, by name or synonym, and nothing else is."""
    for made in EXAMPLES:
        assert {m.name for m in find(made.prompt) if not m.is_class} == set(made.collage.names), made.prompt


def test_a_ground_that_is_named_is_painted() -> None:
    """Corners have the colour that the prompt says, up to the shading of the ground."""
    told = [(name, made) for made in EXAMPLES for name in GROUNDS if f"on a {name} background" in made.prompt]
    assert len(told) > 20
    for name, made in told:
        first = np.array(made.collage.layout.ground.first)
        assert np.abs(first - np.array(GROUNDS[name])).max() <= 8
        assert (made.collage.picture == first).all(-1).any()


def test_same_seed_same_example() -> None:
    """Seeds decide everything; other seeds differ."""
    again = example(7)
    assert again.prompt == EXAMPLES[7].prompt
    assert (again.collage.picture == EXAMPLES[7].collage.picture).all()
    assert len({made.collage.picture.tobytes() for made in EXAMPLES}) == len(EXAMPLES)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_counts_occur(count: int) -> None:
    """One, two and three objects all come up."""
    assert any(len(made.collage.names) == count for made in EXAMPLES)
