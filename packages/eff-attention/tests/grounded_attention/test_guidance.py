"""Guidance by the same model without its pictures, against whole passes."""

import pytest
import torch
from eff_attention.grounded_attention import PAINTConfig, TextGuidance, apply_paint

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "suppress_tokens": [95, 96]}
PROMPTS = [(1, 5, "P", 6, 7, 8), (1, "P", 9, 10)]  # the second is padded


def bare(zoo, family, pieces):
    ids = zoo.ask(family, pieces)["input_ids"][0].tolist()
    return zoo.ask(family, tuple(t for t in ids if t != zoo.image))


def by_passes(zoo, family, model, gamma, cutoff):
    """Greedy answers [B, 4], each from whole passes over the prompt with and without its picture."""
    found = []
    for pieces, own in zip(PROMPTS, zoo.each(family, PROMPTS), strict=True):
        words = []
        for _ in range(4):
            now = {**own, "input_ids": torch.cat([own["input_ids"], torch.tensor([words], dtype=torch.long)], 1)}
            for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
                if name in now:
                    now[name] = torch.nn.functional.pad(now[name], (0, len(words)), value=fill)
            here = model(**now).logits[0, -1].log_softmax(-1)
            there = model(**bare(zoo, family, (*pieces, *words))).logits[0, -1].log_softmax(-1)
            score = gamma * (here - there) + there
            score[here < here.max() + torch.tensor(cutoff).log()] = -torch.inf
            score[[95, 96]] = -torch.inf
            words.append(int(score.argmax()))
        found.append(words)
    return torch.tensor(found)


@torch.no_grad()
def test_answers(zoo, family):
    model, inputs = zoo(family), zoo.ask(family, *PROMPTS)
    if family == "PaliGemma":
        with pytest.raises(NotImplementedError, match="PaliGemma"):
            TextGuidance(model, inputs)
        return
    guide = TextGuidance(model, inputs, gamma=3.0, cutoff=0.05)
    found = model.generate(**inputs, **GREEDY, logits_processor=[guide])[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(found, by_passes(zoo, family, model, 3.0, 0.05))
    plain = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    same = model.generate(**inputs, **GREEDY, logits_processor=[TextGuidance(model, inputs, gamma=1.0, cutoff=0.0)])
    assert torch.equal(same[:, inputs["input_ids"].shape[1] :], plain)
    assert not torch.equal(found, plain)


@torch.no_grad()
def test_beams_and_raised_attention(zoo):
    """Beams change places; attention is raised where pictures are, and the side without has none."""
    model, inputs = zoo("Llava"), zoo.ask("Llava", *PROMPTS)
    with apply_paint(model, PAINTConfig()):
        guides = [TextGuidance(model, inputs, gamma=2.0)]
        together = model.generate(**inputs, **GREEDY, num_beams=3, logits_processor=guides)
        for i, own in enumerate(zoo.each("Llava", PROMPTS)):
            alone = model.generate(**own, **GREEDY, num_beams=3, logits_processor=[TextGuidance(model, own, gamma=2.0)])
            assert torch.equal(alone[0, -4:], together[i, -4:])


@pytest.mark.parametrize(
    ("options", "says"), [({"gamma": -1.0}, "gamma=-1.0"), ({"cutoff": 2.0}, "cutoff=2.0"), ({}, "input_ids")]
)
def test_bad_input(zoo, options, says):
    inputs = {} if says == "input_ids" else zoo.ask("Llava", (1, "P"))
    with pytest.raises(ValueError, match=says):
        TextGuidance(zoo("Llava"), inputs, **options)
