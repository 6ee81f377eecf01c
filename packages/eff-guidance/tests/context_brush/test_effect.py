"""What the brush does to a small FLUX Fill that has learnt to copy digits; figures are from ``bench``."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from eff_guidance.context_brush import CanvasSpans, ContextBrushConfig, apply_incontext_brush

SPANS = CanvasSpans(grid=(8, 4), subjects=((0, 0, 4, 4),), query=(4, 0, 8, 4))


@pytest.fixture(scope="module")
def copying():
    pytest.importorskip("sklearn")
    path = Path(__file__).with_name("copy_digits.py")
    spec = importlib.util.spec_from_file_location("eff_copy_digits", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_shifting_makes_the_result_more_like_the_demonstration(copying):
    """Paired over 96 digits in random colours that the model has not seen, without a prompt."""
    shapes, classes = (x[1500:1596] for x in copying.digits())
    draw = torch.Generator().manual_seed(1)
    demo = copying.paint(shapes, copying.random_colours(len(shapes), draw))
    model = copying.load_model()
    text = copying.prompts(classes, torch.zeros(len(demo)))
    found = []
    for share in (0.0, 0.3):
        config = ContextBrushConfig(shift_image=share, shift_text=0, head_gain=0)
        with apply_incontext_brush(model, SPANS, config):
            found.append(copying.likeness(copying.fill(model, demo, *text), demo))
    gain = found[1] - found[0]
    assert found[0].mean() > 0.3  # it has learnt to copy
    assert gain.mean() > 2 * gain.std() / len(gain) ** 0.5


def test_gains_of_heads_make_the_prompt_count_more(copying):
    """Digits asked for while the demonstration shows another one: 160 of them, three in four obeyed without gains."""
    shapes, classes = (x[1500:1660] for x in copying.digits())
    draw = torch.Generator().manual_seed(1)
    demo = copying.paint(shapes, copying.random_colours(len(shapes), draw))
    asked = (classes + 1 + torch.randint(9, (len(classes),), generator=draw)) % 10
    model = copying.load_model()
    obeyed = []
    for gain in (0.0, 0.4):
        with apply_incontext_brush(model, SPANS, ContextBrushConfig(shift_image=0, shift_text=0, head_gain=gain)):
            made = copying.fill(model, demo, *copying.prompts(asked, torch.ones(len(demo))))
        obeyed.append((copying.nearest_class(made) == asked).float())
    assert obeyed[0].mean() > 0.5
    assert (obeyed[1] - obeyed[0]).sum() >= 4
