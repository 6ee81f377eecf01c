"""Grids of pictures stay right while ``generate`` runs, which gives their sizes with the first pass alone."""

import pytest
import torch
from eff_kernels.edit.attention import decoder_attention, observe_attention
from eff_kernels.edit.caches import cache_kwargs
from transformers import DynamicCache

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "suppress_tokens": [95, 96]}
SIZES = ("image_sizes", "image_grid_thw")


def watched(model, run):
    """What the keys of the first layer show in each pass: parts, lines and columns."""
    found, given = [], []

    def note(call, output):
        keys = call.roles.keys
        found.append(torch.stack([keys.picture, keys.part, keys.row, keys.column]).clone())

    before = model.model.register_forward_pre_hook(
        lambda m, a, k: given.append(any(k.get(n) is not None for n in SIZES)), with_kwargs=True
    )
    try:
        with observe_attention(model, note, where=decoder_attention(model)[0], needs=("roles",)):
            run()
    finally:
        before.remove()
    return found, given


@pytest.mark.parametrize("name", ["LlavaNext", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_in_generate(zoo, name):
    model = zoo(name)
    inputs = zoo.ask(name, (1, 5, "P", 6, 7), (1, "P", 9, "P", 10, 11, 12))
    found, _ = watched(model, lambda: model.generate(**inputs, **GREEDY))
    assert len(found) == 4
    count, first = inputs["input_ids"].shape[1], found[0]
    assert int(first[0].max()) == 1
    assert int(first[2].max()) > 0
    for later in found[1:]:
        assert torch.equal(later[:, :, :count], first)
        assert bool((later[:, :, count:] == -1).all())


@torch.no_grad()
def test_a_second_picture_on_the_same_cache(zoo):
    """A later turn brings a picture, and the size of that one alone."""
    name = "LlavaNext"
    model = zoo(name)
    one, whole = zoo.ask(name, (1, 5, "P", 6, 7)), zoo.ask(name, (1, 5, "P", 6, 7, "P", 8))
    half, start = len(whole["pixel_values"]) // 2, one["input_ids"].shape[1]

    def run():
        cache = DynamicCache(config=model.config.get_text_config())
        model(**one, **cache_kwargs(model, cache))
        later = {k: v[:, start:] for k, v in whole.items() if k in ("input_ids", "mm_token_type_ids")}
        later |= {k: v[1:] for k, v in whole.items() if k in SIZES}
        later |= {"pixel_values": whole["pixel_values"][half:], "attention_mask": whole["attention_mask"]}
        model(**later, **cache_kwargs(model, cache))

    found, given = watched(model, run)
    assert given == [True, True]
    straight, _ = watched(model, lambda: model(**whole))
    assert torch.equal(found[1], straight[0])
    assert int(found[1][0].max()) == 1


@pytest.mark.parametrize("name", ["LlavaNext", "Qwen2VL"])
def test_every_beam_has_the_grids_of_its_prompt(zoo, name):
    model = zoo(name)
    inputs = zoo.ask(name, (1, 5, "P", 6, 7), (1, "P", 9, "P", 10, 11, 12))
    alone, _ = watched(model, lambda: model.generate(**inputs, **GREEDY))
    found, _ = watched(model, lambda: model.generate(**inputs, **GREEDY, num_beams=2))
    assert torch.equal(found[0], alone[0].repeat_interleave(2, 1))
