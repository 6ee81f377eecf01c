import copy

import eff_attention.layer_reuse.rule as module
import pytest
import torch
from eff_attention.layer_reuse import LayerReuseConfig, apply_layer_reuse
from eff_kernels.edit.caches import cache_kwargs

LAYERS = 6
SIZES = {"top_k": 64, "block_size": 16, "min_seq_len": 64}
SETTINGS = LayerReuseConfig(**SIZES)


def test_equals_dense_where_all_blocks_are_kept(any_model, mixed, decode, prompt):
    tokens = prompt(2)
    wanted = decode(any_model, tokens)
    settings = LayerReuseConfig(top_k=256, block_size=16, min_seq_len=256)
    with apply_layer_reuse(any_model, mixed, settings):
        assert torch.equal(decode(any_model, tokens), wanted)  # not above min_seq_len
    settings = LayerReuseConfig(top_k=192, block_size=16, min_seq_len=192)
    with apply_layer_reuse(any_model, mixed, settings):
        actual = decode(any_model, tokens, steps=20)
    wanted = decode(any_model, tokens, steps=20)
    torch.testing.assert_close(actual[:, :12], wanted[:, :12], rtol=0, atol=0)
    assert not torch.equal(actual[:, 13:], wanted[:, 13:])


def test_top_k_of_the_whole_length_is_dense(any_model, monkeypatch, mixed, decode, prompt):
    """The sparse path itself, with as many blocks as there are."""
    tokens = prompt(2)
    wanted = decode(any_model, tokens)
    settings = LayerReuseConfig(top_k=64, block_size=16, min_seq_len=64)
    monkeypatch.setattr(LayerReuseConfig, "num_blocks", 1000)
    with apply_layer_reuse(any_model, mixed, settings):
        actual = decode(any_model, tokens)
    assert (actual - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert not torch.equal(actual, wanted)


@pytest.mark.parametrize("selector", ["exact", "pooled", "hash"])
def test_the_sparse_path_is_as_near_to_float64_as_dense(any_model, monkeypatch, mixed, decode, prompt, selector):
    """Logits of size 6 with rounding of 1e-5, in dense attention as well: 1e-5 apart is not to be had, this is."""
    tokens = prompt(2)
    exact, dense = decode(copy.deepcopy(any_model).double(), tokens), decode(any_model, tokens)
    monkeypatch.setattr(LayerReuseConfig, "num_blocks", 1000)
    with apply_layer_reuse(any_model, mixed, LayerReuseConfig(**SIZES, selector=selector)):
        found = decode(any_model, tokens)
    assert (found - exact).norm() < 1.5 * (dense - exact).norm()
    assert (found - exact).abs().max() < 5e-5


def test_all_full_is_bit_identical_and_all_is_taken_back(any_model, mixed, policy, decode, prompt):
    tokens = prompt()
    wanted = decode(any_model, tokens)
    with apply_layer_reuse(any_model, policy("F" * LAYERS), SETTINGS):
        assert torch.equal(decode(any_model, tokens), wanted)
    handle = apply_layer_reuse(any_model, mixed, SETTINGS)
    assert not torch.equal(decode(any_model, tokens), wanted)
    handle.remove()
    handle.remove()
    assert any_model.config._attn_implementation == "sdpa"
    assert torch.equal(decode(any_model, tokens), wanted)
    assert "config" not in vars(type(any_model.model.layers[0].self_attn))
    assert all(type(layer.self_attn.config) is type(any_model.config) for layer in any_model.model.layers)
    assert not any_model.base_model._forward_pre_hooks


def test_reusing_layers_read_only_what_was_chosen(model, monkeypatch, mixed, decode, prompt):
    """All other keys and values become NaN, in the cache of the reusing layers alone."""
    tokens, calls = prompt(), []
    run = module.decode_attention

    def poisoned(q, k, v, lengths, *, block_table, run, scale):
        if block_table is None:  # a full layer
            return real(q, k, v, lengths, scale=scale)
        kept = torch.zeros(k.shape[:3], dtype=torch.bool)
        for i in range(int(lengths)):
            for head in range(k.size(1)):
                kept[0, head, block_table[0, head, i // run] + i % run] = True
        assert kept.sum(2).tolist() == [[int(lengths)] * 2]
        length = k.size(2)
        assert kept[:, :, :16].all()  # the first block and the last two
        assert kept[:, :, 16 * ((length - 1) // 16 - 1) :].all()
        calls.append(int(lengths))
        wanted = real(q, k, v, lengths, block_table=block_table, run=run, scale=scale)
        k, v = (t.masked_fill(~kept[..., None], torch.nan) for t in (k, v))
        actual = real(q, k, v, lengths, block_table=block_table, run=run, scale=scale)
        assert torch.equal(actual, wanted)
        return actual

    real = run
    monkeypatch.setattr(module, "decode_attention", poisoned)
    with apply_layer_reuse(model, mixed, SETTINGS):
        assert decode(model, tokens).isfinite().all()
    assert len(calls) == 4 * 3  # steps, reusing layers
    assert all(48 < n <= 64 for n in calls)


def test_products_of_queries_and_keys_match_the_plan(model, monkeypatch, mixed, decode, prompt):
    """Full and anchors: all keys. Reuse: top_k, less what the last block lacks."""
    products = {"full": 0, "anchor": 0, "reuse": 0}

    def counted(function, kind):
        def call(q, k, v, lengths, **options):
            products[kind or ("full" if options["block_table"] is None else "reuse")] += int(lengths.sum())
            return function(q, k, v, lengths, **options)

        return call

    for name, kind in (("scored_decode_attention", "anchor"), ("decode_attention", None)):
        monkeypatch.setattr(module, name, counted(getattr(module, name), kind))
    with apply_layer_reuse(model, mixed, SETTINGS):
        decode(model, prompt(length=208), steps=1)
    assert products == {"full": 208, "anchor": 2 * 208, "reuse": 3 * 64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_rows_equal_single_rows(model, dtype, mixed, decode, prompt):
    model = model.to(dtype)
    try:
        tokens, mask = prompt(4), torch.ones(4, 200, dtype=torch.long)
        pads = [0, 37, 120, 160]  # 200, 163, 80 and 40 tokens: the last is below min_seq_len
        for row, pad in enumerate(pads):
            mask[row, :pad] = 0
        with apply_layer_reuse(model, mixed, SETTINGS):
            together = decode(model, tokens, mask=mask)
            alone = [decode(model, tokens[row : row + 1, pad:]) for row, pad in enumerate(pads)]
        # Logits of size 10. bfloat16: kernels of a batch and of a row round otherwise, a choice of blocks may tip over.
        limit = 1e-3 if dtype == torch.float32 else 0.5
        torch.testing.assert_close(together, torch.cat(alone), rtol=limit, atol=limit)
        dense = decode(model, tokens, mask=mask)
        assert (together - dense)[:3].abs().amax((1, 2)).min() > 0.1
    finally:
        model.to(torch.float32)


def test_padding_is_never_chosen(model, mixed, decode, prompt):
    tokens, mask = prompt(2), torch.ones(2, 200, dtype=torch.long)
    mask[1, :90] = 0
    with apply_layer_reuse(model, mixed, SETTINGS):
        wanted = decode(model, tokens, mask=mask)
        tokens[1, :90] = 7
        assert torch.equal(decode(model, tokens, mask=mask), wanted)


@pytest.mark.parametrize("padded", [False, True])
def test_dynamic_and_static_cache_generate_the_same(any_model, padded, mixed, prompt):
    tokens, mask = prompt(2, 100), torch.ones(2, 100, dtype=torch.long)
    if padded:
        mask[0, :20] = 0
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with apply_layer_reuse(any_model, mixed, SETTINGS):
        dynamic, static = (
            any_model.generate(tokens, attention_mask=mask, cache_implementation=kind, disable_compile=True, **options)
            for kind in ("dynamic", "static")
        )
    assert torch.equal(dynamic, static)
    dense = any_model.generate(tokens, attention_mask=mask, **options)
    assert not torch.equal(dynamic, dense)


def test_masks_that_are_not_ours_run_dense(model, mixed, decode, prompt):
    """Holes, a mask of four dimensions after a step of ours, and several tokens at once."""
    from transformers import DynamicCache

    tokens, mask = prompt(), torch.ones(1, 200, dtype=torch.long)
    mask[0, 50:60] = 0
    wanted = decode(model, tokens, mask=mask)
    with apply_layer_reuse(model, mixed, SETTINGS):
        assert torch.equal(decode(model, tokens, mask=mask), wanted)
    results = []
    for applied in (False, True):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens[:, :150], **cache_kwargs(model, cache))
            if applied:
                handle = apply_layer_reuse(model, mixed, SETTINGS)
            out = [model(tokens[:, 150:153], **cache_kwargs(model, cache)).logits]
            holes = torch.ones(1, 1, 1, 154, dtype=torch.bool)
            holes[..., 70:80] = False
            out.append(model(tokens[:, 153:154], attention_mask=holes, **cache_kwargs(model, cache)).logits)
        results.append(torch.cat(out, 1))
    handle.remove()
    assert torch.equal(*results)


def test_full_layers_may_serve(model, policy, decode, prompt):
    """A policy that bridges: layers of kind full give their weights too."""
    tokens = prompt()
    bridged = policy("FF1F33")
    anchored = policy("FA1A33")
    results = []
    for plan in (bridged, anchored):
        with apply_layer_reuse(model, plan, SETTINGS):
            results.append(decode(model, tokens))
    assert torch.equal(*results)


def test_refusals(model, mixed, policy):
    from transformers import MistralConfig, MistralForCausalLM

    with pytest.raises(ValueError, match="the policy has 2 layers, the model 6"):
        apply_layer_reuse(model, policy("F0"), SETTINGS)
    with pytest.raises(NotImplementedError, match="Linear"):
        apply_layer_reuse(torch.nn.Linear(2, 2), mixed, SETTINGS)
    settings = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 11,
    }  # fmt: skip
    sliding = MistralForCausalLM(MistralConfig(**settings, sliding_window=8))
    with pytest.raises(ValueError, match="1: 'sliding_attention'"):
        apply_layer_reuse(sliding, mixed, SETTINGS)


def test_a_model_with_sliding_layers_keeps_them(model, mixed, policy, decode, prompt):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    kinds = ["sliding_attention", "full_attention"] * 3
    settings = Qwen3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=101, layer_types=kinds, use_sliding_window=True, sliding_window=32,
    )  # fmt: skip
    hybrid = Qwen3ForCausalLM(settings).eval()
    with pytest.raises(ValueError, match="2: 'sliding_attention'"):
        apply_layer_reuse(hybrid, mixed, SETTINGS)
    tokens = prompt()
    wanted = decode(hybrid, tokens)
    with apply_layer_reuse(hybrid, policy("FAF1F1"), SETTINGS):
        actual = decode(hybrid, tokens)
    assert actual.isfinite().all()
    assert not torch.equal(actual, wanted)


def test_error_falls_with_anchors_and_with_keys(model, policy, decode, prompt):
    """The more layers choose for themselves, and the more keys they take, the nearer to dense."""
    tokens = prompt(4, 240)
    wanted = decode(model, tokens, steps=20).log_softmax(-1)

    def error(text, **settings):
        with apply_layer_reuse(model, policy(text), LayerReuseConfig(block_size=16, min_seq_len=224, **settings)):
            found = decode(model, tokens, steps=20).log_softmax(-1)
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    by_anchors = [error(text, top_k=96) for text in ("FA1111", "FA1A33", "FAA2A4", "FAAA3A")]
    assert by_anchors == sorted(by_anchors, reverse=True)
    by_keys = [error("FA1A33", top_k=k) for k in (48, 96, 144, 192)]
    assert by_keys == sorted(by_keys, reverse=True)
    assert by_keys[-1] < by_keys[0] / 2
