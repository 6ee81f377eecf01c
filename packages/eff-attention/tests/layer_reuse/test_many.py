"""Threads, copies and pickles of a model with layer reuse; gradients, softcaps and sinks."""

import copy
import io
import threading

import pytest
import torch
from eff_attention.layer_reuse import LayerReuseConfig, LayerReusePolicy, apply_layer_reuse, growing_cache
from eff_kernels.edit.caches import cache_kwargs
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

SETTINGS = LayerReuseConfig(top_k=64, block_size=16, min_seq_len=64)
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("selector", ["exact", "pooled", "hash"])
def test_threads_do_not_meet(model, mixed, prompt, selector):
    prompts, found = [prompt(1, 130), prompt(1, 100)], []
    settings = LayerReuseConfig(top_k=64, block_size=16, min_seq_len=64, selector=selector)
    with apply_layer_reuse(model, mixed, settings):
        wanted = [model.generate(p, **GREEDY) for p in prompts]

        def run(i):
            try:
                found.append(torch.equal(model.generate(prompts[i], **GREEDY), wanted[i]))
            except Exception as error:
                found.append(error)

        for _ in range(6):
            threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert found == [True] * 12


@torch.no_grad()
def step(model, tokens):
    """A step whose mask of four dimensions has a hole, after ``generate`` used the model for something else."""
    cache = DynamicCache(config=model.config)
    model(tokens[:, :120], **cache_kwargs(model, cache))
    model.generate(tokens[:, :90], **{**GREEDY, "max_new_tokens": 4})
    mask = torch.zeros(1, 1, 1, 121)
    mask[..., 30:90] = -1e9
    return model(tokens[:, 120:121], attention_mask=mask, **cache_kwargs(model, cache)).logits


def test_a_copy_is_a_model_of_its_own(model, mixed, prompt, decode):
    tokens = prompt()
    plain = decode(model, tokens)
    with apply_layer_reuse(model, mixed, SETTINGS):
        reused = decode(model, tokens)
        twin = copy.deepcopy(model)
        assert torch.equal(step(model, tokens), step(twin, tokens))
    assert torch.equal(decode(model, tokens), plain)
    assert torch.equal(decode(twin, tokens), reused)
    assert not torch.equal(reused, plain)


def test_a_pickle_keeps_the_policy(model, mixed, prompt, decode):
    tokens, file = prompt(), io.BytesIO()
    with apply_layer_reuse(model, mixed, SETTINGS):
        reused = decode(model, tokens)
        torch.save(model, file)
    file.seek(0)
    assert torch.equal(decode(torch.load(file, weights_only=False), tokens), reused)


def test_a_growing_cache_is_copied_and_pickled(model, prompt):
    tokens, file = prompt(1, 30), io.BytesIO()
    cache = growing_cache(model.config)
    with torch.no_grad():
        model(tokens, **cache_kwargs(model, cache))
        torch.save(cache, file)
        file.seek(0)
        others = [copy.deepcopy(cache), torch.load(file, weights_only=False)]
        wanted = model(tokens[:, :1], **cache_kwargs(model, cache)).logits
        for other in others:
            assert torch.equal(model(tokens[:, :1], **cache_kwargs(model, other)).logits, wanted)
            assert other.layers[0].keys.size(2) == 31


def test_a_step_with_gradients_gives_the_same_and_their_gradients(model, policy, prompt):
    tokens = prompt(1, 101)

    read = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :100], **cache_kwargs(model, read))

    def run(grad):
        with torch.set_grad_enabled(grad):
            return model(tokens[:, 100:], **cache_kwargs(model, copy.deepcopy(read))).logits

    with apply_layer_reuse(model, policy("FA1111"), SETTINGS):  # layer 2 is behind all choices, which jump
        wanted, found = run(False), run(True)
        torch.testing.assert_close(found.detach(), wanted, rtol=0, atol=1e-4)
        weight = model.model.layers[2].self_attn.q_proj.weight
        (gradient,) = torch.autograd.grad(found[0, -1, 3], weight)
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        ends = []
        for sign in (1, -1):
            weight.data.add_(direction, alpha=sign * 1e-3)
            ends.append(run(False)[0, -1, 3].item())
            weight.data.sub_(direction, alpha=sign * 1e-3)
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx((gradient * direction).sum().item(), rel=0.02)


SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 101,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2, "layer_types": ["full_attention"] * 4,
}  # fmt: skip


def sinks():
    model = GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1))
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(2.0)
    return model


def softcap():
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, query_pre_attn_scalar=16, attn_logit_softcapping=5.0))


@pytest.mark.parametrize("make", [sinks, softcap])
def test_sinks_and_softcaps_are_those_of_the_host(make, monkeypatch, prompt, decode):
    torch.manual_seed(0)
    model, tokens = make().eval(), prompt()
    policy = LayerReusePolicy(("full", "anchor", "reuse", "reuse"), (-1, -1, 1, 1))
    wanted = decode(model, tokens)
    with apply_layer_reuse(model, policy, SETTINGS):
        sparse = decode(model, tokens)
    assert not torch.allclose(sparse, wanted, atol=1e-3)
    monkeypatch.setattr(LayerReuseConfig, "num_blocks", 1000)
    with apply_layer_reuse(model, policy, SETTINGS):
        assert (decode(model, tokens) - wanted).abs().max() < 2e-5 * wanted.abs().max()
