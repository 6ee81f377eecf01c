"""Calibration with a cache: means that run on, means of the prompt, and whatever hosts do to caches."""

import copy

import pytest
import torch
from eff_attention.sink_calibration import ACTConfig, apply_act, calibrate_attention, find_attention_sinks, sinks_in
from eff_kernels.edit.attention import intercept_attention
from eff_kernels.edit.caches import cache_kwargs
from transformers import DynamicCache

HEADS = {0: (0, 3), 1: (1, 2), 2: (0, 1, 2, 3)}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def read(model, cache, ids, pieces=(), mask=None):
    """Logits of ids [B, n] read in pieces that end at these places."""
    ends = [*pieces, ids.shape[1]]
    out = []
    for first, last in zip([0, *pieces], ends, strict=True):
        more = {}
        if mask is not None:
            more = {"attention_mask": mask[:, :last], "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, first:last]}
        out.append(model(input_ids=ids[:, first:last], use_cache=True, **cache_kwargs(model, cache), **more).logits)
    return torch.cat(out, 1)


@torch.no_grad()
@pytest.mark.parametrize("threshold", [("absolute", 0.1), ("relative", 3.0)])
@pytest.mark.parametrize("pieces", [tuple(range(1, 20)), (7, 12), (15, 16, 17), ()])
def test_running_sinks_are_those_of_the_whole_map(model, ids, reference, pieces, threshold):
    heads = {0: (0, 3)}  # of the first layer: what it reads is not changed by what was calibrated before
    _, maps = reference(model, ids[:1], {})
    cache = DynamicCache(config=model.config)
    with apply_act(model, ACTConfig(heads=heads, threshold=threshold)):
        for first, last in zip([0, *pieces], [*pieces, 20], strict=True):
            read(model, cache, ids[:1, first:last])
            state = sinks_in(cache)[0]
            wanted = find_attention_sinks(maps[0][:, [0, 3], :last, :last], threshold)
            assert torch.equal(state.sinks, wanted)
            torch.testing.assert_close(state.sums, maps[0][:, [0, 3], :last, :last].sum(2), rtol=1e-5, atol=1e-5)
            assert state.rows[0].tolist() == list(range(last, 0, -1))


@torch.no_grad()
def test_sinks_of_all_layers_without_a_change(any_model, ids, reference):
    _, maps = reference(any_model, ids[:1], {})
    cache = DynamicCache(config=any_model.config)
    with apply_act(any_model, ACTConfig(layers=(0, 1, 2), beta=1.0)):
        read(any_model, cache, ids[:1], tuple(range(1, 20)))
    for layer in range(3):
        assert torch.equal(sinks_in(cache)[layer].sinks, find_attention_sinks(maps[layer]))


def fixed(model, ids, sinks, beta=0.4):
    """Logits of the last token when the last layer has these sinks [B, H, n]."""

    def rule(call, attend):
        if call.layer != 2:
            return attend(call)
        return attend.with_weights(call, lambda block, part: calibrate_attention(block, sinks, beta))

    with intercept_attention(model, rule):
        return model(input_ids=ids, use_cache=False).logits[:, -1]


@torch.no_grad()
@pytest.mark.parametrize("decode", ["running", "prefill_sinks", "off"])
def test_a_step_is_calibrated_by_its_sinks(model, ids, reference, decode):
    """Of the last layer: nothing that it does goes into the cache, so that whole passes tell what a step must give."""
    _, maps = reference(model, ids[:1], {})
    plain = read(model, DynamicCache(config=model.config), ids[:1], (10, *range(11, 20)))
    cache, twin = DynamicCache(config=model.config), copy.deepcopy(model)
    with apply_act(model, ACTConfig(layers=(2,), decode=decode)):
        read(model, cache, ids[:1, :10])
        changed = []
        for n in range(11, 21):
            found = read(model, cache, ids[:1, n - 1 : n])[:, -1]
            seen = n if decode == "running" else 10
            sinks = find_attention_sinks(maps[2][:, :, :seen, :seen])
            sinks = torch.nn.functional.pad(sinks, (0, n - seen))
            if decode == "off":
                assert torch.equal(found, plain[:, n - 1])
                continue
            wanted = fixed(twin, ids[:1, :n], sinks)
            assert (found - wanted).norm() < 1e-5 * wanted.norm()
            changed.append(bool((found - plain[:, n - 1]).norm() > 1e-3 * wanted.norm()))
        assert any(changed) is (decode != "off")


@torch.no_grad()
@pytest.mark.parametrize("decode", ["running", "prefill_sinks", "off"])
@pytest.mark.parametrize("pad", [0, 4])
def test_generate(any_model, ids, decode, pad):
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    with apply_act(any_model, ACTConfig(heads=HEADS, decode=decode)):
        dynamic = any_model.generate(ids, attention_mask=mask, **GREEDY)
        static = any_model.generate(
            ids, attention_mask=mask, cache_implementation="static", disable_compile=True, **GREEDY
        )
        assert torch.equal(dynamic, static)
        alone = any_model.generate(ids[1:, pad:], **GREEDY)
        assert torch.equal(dynamic[1:, pad:], alone)
        cache = DynamicCache(config=any_model.config)
        full = torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], 1)
        steps = read(any_model, cache, dynamic[:, :-1], tuple(range(20, 25)), mask=full[:, :-1])
        assert torch.equal(steps[:, 19:].argmax(-1), dynamic[:, 20:])


@torch.no_grad()
def test_a_cache_that_the_model_made_goes_on(model, ids):
    with apply_act(model, ACTConfig(heads=HEADS)):
        cache = DynamicCache(config=model.config)
        wanted = read(model, cache, ids, (19,))[:, -1]
        made = model(input_ids=ids[:, :19], use_cache=True)
        held = getattr(made, "cache", None) or made.past_key_values
        assert sinks_in(held)[0].length == 19
        assert torch.equal(read(model, held, ids[:, 19:])[:, -1], wanted)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_cache_may_change_places(model, ids, dtype):
    model.to(dtype)
    ids = torch.cat([ids, ids.flip(1)])
    at = torch.tensor([2, 2, 0, 3])
    with apply_act(model, ACTConfig(heads=HEADS)):
        cache, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
        read(model, cache, ids[:, :19])
        cache.reorder_cache(at)
        found = read(model, cache, ids[at, 19:])
        read(model, other, ids[:, :19])
        wanted = read(model, other, ids[:, 19:])[at]
        assert not torch.equal(sinks_in(other)[0].sums[at], sinks_in(other)[0].sums)
        assert torch.equal(sinks_in(cache)[0].sums, sinks_in(other)[0].sums[at])
        assert (found - wanted).float().norm() < (1e-5 if dtype == torch.float32 else 2e-2) * wanted.float().norm()


@torch.no_grad()
def test_beams(model, ids):
    with apply_act(model, ACTConfig(heads=HEADS)):
        together = model.generate(ids, num_beams=3, **GREEDY)
        for i in range(2):
            assert torch.equal(model.generate(ids[i : i + 1], num_beams=3, **GREEDY)[0], together[i])


@torch.no_grad()
def test_prefixes_are_copied_and_cut(model, ids):
    config = ACTConfig(heads=HEADS)
    with apply_act(model, config):
        prefix = DynamicCache(config=model.config)
        read(model, prefix, ids[:, :12])
        found = [read(model, copy.deepcopy(prefix), ids[:, 12:]) for _ in range(2)]
        assert torch.equal(*found)
        assert sinks_in(prefix)[0].length == 12
        prefix.crop(-4)
        with pytest.raises(NotImplementedError, match="8 tokens, sinks are known of 12"):
            read(model, prefix, ids[:, 12:])
    with apply_act(model, ACTConfig(heads=HEADS, decode="prefill_sinks")):
        cache = DynamicCache(config=model.config)
        read(model, cache, ids, (12, *range(13, 20)))
        assert sinks_in(cache)[0].length == 12
        cache.crop(-5)
        found = read(model, cache, ids[:, 15:16])
        other = DynamicCache(config=model.config)
        wanted = read(model, other, ids[:, :16], (12, *range(13, 16)))[:, -1:]
        assert torch.equal(found, wanted)


@torch.no_grad()
def test_foreign_caches(model, ids):
    with apply_act(model, ACTConfig(heads=HEADS)):
        cache, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
        read(model, cache, ids[:, :10])
        read(model, other, ids.flip(1)[:, :10])
        cache.layers = other.layers
        with pytest.raises(RuntimeError, match="other keys"):
            read(model, cache, ids[:, 10:])
    late = DynamicCache(config=model.config)
    read(model, late, ids[:, :10])
    with apply_act(model, ACTConfig(heads=HEADS)):
        read(model, late, ids[:, 10:])
    assert sinks_in(late)[0].rows[0].tolist() == [10] * 11 + list(range(9, 0, -1))


@torch.no_grad()
def test_compile_gives_the_same(model, ids):
    with apply_act(model, ACTConfig(heads=HEADS)):
        wanted = model(input_ids=ids, use_cache=False).logits
        torch._dynamo.reset()
        found = torch.compile(model, backend="eager")(input_ids=ids, use_cache=False).logits
        torch._dynamo.reset()
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
