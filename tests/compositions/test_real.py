"""Stacks and pairs on real models: what they promise, and what eff-studio's engine makes of a whole stack."""

import numpy as np
import pytest
from composing import Stack, check
from marks import MARKS
from real import COLLAGES, PAIRS, REFUSED, STACKS, Drawing, studio

pytest.importorskip("eff_embedded")
pytestmark = [pytest.mark.slow, *MARKS]


def named(rows):
    return [pytest.param(*row, id=f"{row[0].name}: {' + '.join(row[1])}") for row in rows]


@pytest.mark.parametrize(("family", "names", "promises"), named([*STACKS, *PAIRS]))
def test_together(family, names, promises):
    check(family, names, promises)


@pytest.mark.parametrize(("family", "pair"), named(REFUSED))
def test_what_is_refused_leaves_the_first_as_it_was(family, pair):
    stack = Stack(family, [family.parts[pair[0]]])
    before = {name: value.clone() for name, value in stack.model.state_dict().items()}
    with pytest.raises(ValueError, match=family.refusals[pair]):
        family.parts[pair[1]].apply(stack.model)
    after = stack.model.state_dict()
    assert before.keys() == after.keys()
    assert all(value.equal(after[name]) for name, value in before.items())


def test_the_studio_draws_with_a_whole_stack_and_takes_it_off():
    import dataclasses

    from eff_studio.engine.draw import run_work
    from eff_studio.work import Generate, Heads, LayerBox

    drawing = Drawing()
    model = dataclasses.replace(studio(), pipe=drawing.pipe)

    def draw(**methods):
        work = Generate(prompt=COLLAGES.data(), steps=3, **methods)
        made = run_work(model, work, open_picture=None, report=lambda progress: None, cancelled=lambda: False)
        return np.asarray(made.images[0], np.int32)

    heads = {"heads": Heads(weights=((3, 0, 0.5), (4, 1, 0.5)))}
    layers = {
        "layers": (LayerBox(prompt="a dog", box=(0.1, 0.4, 0.6, 0.9)), LayerBox(prompt="a house", box=(0.4, 0, 1, 0.6)))
    }
    pictures = [draw()]
    COLLAGES.parts["int8"].apply(drawing)
    pictures.append(stored := draw())
    adapter = COLLAGES.parts["LoRA (PEFT)"].apply(drawing)
    pictures += [adapted := draw(), draw(**heads), draw(**layers), draw(**heads, **layers)]
    assert np.abs(stored - pictures[0]).mean() < 2  # of 255
    assert len({picture.tobytes() for picture in pictures}) == len(pictures), "a method has no effect beside the others"
    assert (draw() == adapted).all(), "the engine left something of heads or layers on the pipeline"
    adapter.remove()
    assert (draw() == stored).all(), "the adapter is not undone"
