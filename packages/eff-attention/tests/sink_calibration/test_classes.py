"""Calibration in text classes beside those of the other tests: prompts, padding, caches, beams, bfloat16."""

import copy
import functools

import pytest
import torch
from eff_attention.sink_calibration import ACTConfig, apply_act
from eff_kernels.edit.caches import cache_kwargs
from transformers import DynamicCache

HEADS = {0: (0, 3), 1: (1, 2), 2: (0, 1, 2, 3)}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
CLASSES = ("Mistral", "Qwen3", "Gemma2")


@functools.cache
def built(name):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=67, max_position_embeddings=256, initializer_range=0.3, pad_token_id=0,
        bos_token_id=None, eos_token_id=None, attn_implementation="eager" if name == "Gemma2" else "sdpa",
    )  # fmt: skip
    if name == "Mistral":  # as from version 0.2 on
        config.sliding_window = None
    if name == "Gemma2":  # logits of attention are capped
        config.layer_types = ["full_attention"] * 3
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.fixture(params=CLASSES)
def text_model(request):
    return copy.deepcopy(built(request.param))


@torch.no_grad()
def test_prompts_padding_and_bfloat16(text_model, ids, reference):
    name = type(text_model).__name__
    plain = text_model(input_ids=ids[:1], use_cache=False).logits
    if "Gemma2" not in name:  # the reference knows no cap
        wanted, _ = reference(text_model, ids[:1], HEADS)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    with apply_act(text_model, ACTConfig(heads=HEADS)):
        found = text_model(input_ids=ids[:1], use_cache=False).logits
        both = text_model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=False
        ).logits
        alone = text_model(input_ids=ids[1:, 6:], use_cache=False).logits
        half = text_model.bfloat16()(input_ids=ids[:1], use_cache=False).logits.float()
    if "Gemma2" not in name:
        assert (found - wanted).norm() < 1e-5 * wanted.norm()
    assert (found - plain).norm() > 1e-2 * plain.norm()
    assert (both[1:, 6:] - alone).norm() < 1e-5 * alone.norm()
    assert (half - found).norm() < 0.2 * found.norm()


@torch.no_grad()
def test_generate_and_beams(text_model, ids):
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with apply_act(text_model, ACTConfig(heads=HEADS)):
        found = text_model.generate(ids, attention_mask=mask, **GREEDY)
        for more in (
            {"cache_implementation": "static", "disable_compile": True},
            cache_kwargs(text_model, DynamicCache(config=text_model.config)),
        ):
            assert torch.equal(text_model.generate(ids, attention_mask=mask, **GREEDY, **more), found)
        beams = text_model.generate(ids, attention_mask=mask, num_beams=3, **GREEDY)
        for i, skip in enumerate((0, 4)):
            own = ids[i : i + 1, skip:]
            assert torch.equal(text_model.generate(own, **GREEDY)[0], found[i, skip:])
            assert torch.equal(text_model.generate(own, num_beams=3, **GREEDY)[0], beams[i, skip:])


@torch.no_grad()
@pytest.mark.parametrize("decode", ["running", "prefill_sinks"])
def test_nothing_to_change_is_bit_identical(text_model, ids, decode):
    before, tokens = text_model(input_ids=ids, use_cache=False).logits, text_model.generate(ids, **GREEDY)
    with apply_act(text_model, ACTConfig(heads=HEADS, beta=1.0, decode=decode)):
        assert torch.equal(text_model(input_ids=ids, use_cache=False).logits, before)
        assert torch.equal(text_model.generate(ids, **GREEDY), tokens)
    assert torch.equal(text_model(input_ids=ids, use_cache=False).logits, before)
