import copy

import pytest
import torch
from eff_attention.layer_reuse import LayerReuseConfig, LayerReusePolicy, apply_layer_reuse, growing_cache
from eff_kernels.edit.caches import cache_kwargs


@pytest.fixture
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_generates_what_the_cache_of_transformers_does(model, options):
    ids = torch.randint(1, 64, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    found = []
    for cache in (None, growing_cache(model.config)):
        torch.manual_seed(1)
        found.append(
            model.generate(ids, attention_mask=mask, max_new_tokens=40, **cache_kwargs(model, cache), **options)
        )
    assert torch.equal(*found)


@torch.no_grad()
def test_appends_in_place_and_grows(model):
    from transformers import DynamicCache

    ours, theirs = growing_cache(model.config), DynamicCache(config=model.config)
    where, sizes = [], []
    for length in (30, 1, 1, 280, 1, 3):
        ids = torch.randint(0, 64, (1, length))
        got, wanted = (model(ids, **cache_kwargs(model, cache)).logits for cache in (ours, theirs))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        where.append(ours.layers[0].keys.data_ptr())
        sizes.append(ours.layers[0].buffers[0].size(2))
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert torch.equal(ours.layers[1].values, theirs.layers[1].values)
    assert where[0] == where[1] == where[2] != where[3] == where[4] == where[5]
    assert sizes == [286] * 3 + [568] * 3


@torch.no_grad()
def test_crop_copy_and_reset(model):
    cache = growing_cache(model.config)
    ids = torch.randint(0, 64, (1, 12))
    whole = model(ids, **cache_kwargs(model, growing_cache(model.config))).logits
    model(ids[:, :10], **cache_kwargs(model, cache))
    twin = copy.deepcopy(cache)
    cache.crop(-3)
    model(
        torch.randint(0, 64, (1, 5)), **cache_kwargs(model, cache)
    )  # writes over what was cropped, not over the twin's
    cache.crop(-5)
    for held, start in ((cache, 7), (twin, 10)):
        rest = model(ids[:, start:], **cache_kwargs(model, held)).logits
        torch.testing.assert_close(rest, whole[:, start:], rtol=1e-5, atol=1e-5)
    cache.reset()
    torch.testing.assert_close(model(ids, **cache_kwargs(model, cache)).logits, whole)


def test_gradients_go_through_it(model):
    cache = growing_cache(model.config)
    model(torch.randint(0, 64, (1, 5)), **cache_kwargs(model, cache))
    model(torch.randint(0, 64, (1, 2)), **cache_kwargs(model, cache)).logits.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_layer_reuse_runs_on_it(model):
    ids, mask = torch.randint(1, 64, (2, 60)), torch.ones(2, 60, dtype=torch.long)
    mask[1, :7] = 0
    policy = LayerReusePolicy(kind=("full", "anchor", "reuse"), source=(-1, -1, 1), score=1.0, meta={})
    config = LayerReuseConfig(top_k=32, block_size=8, min_seq_len=32)
    with apply_layer_reuse(model, policy, config):
        found = [
            model.generate(ids, attention_mask=mask, max_new_tokens=20, output_logits=True,
                           return_dict_in_generate=True, **cache_kwargs(model, cache))
            for cache in (None, growing_cache(model.config))
        ]  # fmt: skip
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(found[0].logits, found[1].logits)


def test_other_layers_stay_what_they_are():
    from transformers import Gemma3TextConfig

    types = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(num_hidden_layers=2, layer_types=types, sliding_window=8)
    assert [type(layer).__name__ for layer in growing_cache(config).layers] == [
        "DynamicSlidingWindowLayer",
        "GrowingLayer",
    ]
