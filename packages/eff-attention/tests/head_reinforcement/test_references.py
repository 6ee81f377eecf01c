"""Texts that heads were measured on before are not read without pictures again."""

import copy
import pickle

import pytest
import torch
from eff_attention.head_reinforcement import VHRConfig, apply_vhr
from eff_attention.head_reinforcement.references import References
from eff_kernels.edit.attention import find_decoder

ALL = VHRConfig(layers=(0, 1, 2, 3))
PROMPT, OTHER_TEXT = (1, 5, "P", 6, 7, 8), (1, 5, "P", 6, 7, 9)


class Passes:
    """Counts forwards of a decoder."""

    def __init__(self, model):
        self.count = 0
        self.hook = find_decoder(model).register_forward_pre_hook(self.add)

    def add(self, *_):
        self.count += 1

    def of(self, run):
        before = self.count
        return run(), self.count - before


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Llava", "Qwen2VL", "Gemma3"])
def test_other_pictures_with_the_same_text_cost_one_pass(zoo, kind):
    model = zoo(kind)
    first, text = zoo.ask(kind, PROMPT), zoo.ask(kind, OTHER_TEXT)
    second = {**first, "pixel_values": first["pixel_values"].flip(-1)}
    with apply_vhr(model, ALL):
        wanted = [model(**x).logits for x in (first, second, text)]
    passes = Passes(model)
    with apply_vhr(model, ALL, remember=2) as handle:
        asked = ((first, 0, 2), (second, 1, 1), (first, 0, 1), (text, 2, 2), (first, 0, 1))
        for inputs, want, count in asked:
            found, took = passes.of(lambda inputs=inputs: model(**inputs).logits)
            assert torch.equal(found, wanted[want])
            assert took == count
        assert passes.of(lambda: handle.heads(second))[1] == 1
    with apply_vhr(model, ALL):
        assert passes.of(lambda: model(**first))[1] == 2
    passes.hook.remove()
    assert not torch.equal(wanted[0], wanted[1])


@torch.no_grad()
def test_changed_weights_and_texts_too_many_are_measured_again(zoo):
    model = copy.deepcopy(zoo("Llava"))
    first, text = zoo.ask("Llava", PROMPT), zoo.ask("Llava", OTHER_TEXT)
    passes = Passes(model)
    with apply_vhr(model, ALL, remember=1):
        took = [passes.of(lambda x=x: model(**x))[1] for x in (first, text, first)]
        assert took == [2, 2, 2]
        next(find_decoder(model).parameters()).mul_(1.5)
        found, count = passes.of(lambda: model(**first).logits)
        assert count == 2
    with apply_vhr(model, ALL):
        assert torch.equal(model(**first).logits, found)


def test_copies_begin_empty():
    held = References(2)
    held.put(b"text", {0: torch.zeros(1)})
    assert held.get(b"text")
    for other in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        assert other.size == 2
        assert other.get(b"text") is None


def test_what_cannot_be_told_apart_is_not_kept():
    decoder = torch.nn.Linear(2, 2).eval()
    held = References(1)
    assert held.key(decoder, {"x": torch.zeros(2)}) != held.key(decoder, {"x": torch.ones(2)})
    assert held.key(decoder, {"x": torch.zeros(2)}) == held.key(decoder, {"x": torch.zeros(2)})
    assert held.key(decoder, {"x": object()}) is None
    assert held.key(decoder.train(), {"x": torch.zeros(2)}) is None
    with pytest.raises(ValueError, match="remember=-1"):
        References(-1)
