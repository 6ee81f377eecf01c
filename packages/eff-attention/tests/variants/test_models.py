import copy
import itertools

import pytest
import torch

pytest.importorskip("transformers")

from eff_attention.variants import (
    KINDS,
    AttentionVariantConfig,
    attention_maps,
    build_hybrid,
    load_hybrid,
    parameter_report,
    precompute_maps,
    skip_layers,
    swap_layers_,
    variant_layers,
)
from eff_attention.variants.context import VariantContext, decoder_of, stream_maps
from eff_kernels.edit.caches import cache_kwargs
from transformers import DynamicCache, LlamaConfig, Qwen2Config, Qwen3Config

WIDTH, HEADS, MAX = 48, 4, 24
STATIC = ("rnd_emb_qk", "fixed_seq_qk")


def make(kind, layout="uniform", *, host=LlamaConfig, heads=2, seed=0, layers=4, **options):
    torch.manual_seed(seed)
    config = host(
        vocab_size=61, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=heads, head_dim=WIDTH // HEADS, max_position_embeddings=64, initializer_range=0.2,
        tie_word_embeddings=False, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    options |= {"max_len": MAX, "qk_norm": kind == "non_approximate"}
    if kind == "fixed_seq_qk":
        options["fixed_ids"] = tuple(i * 7 % 61 for i in range(MAX))
    return build_hybrid(
        config, AttentionVariantConfig(kind=kind, **options), layout, match_params=heads == HEADS
    ).eval()


def tokens(batch=2, length=13, seed=1):
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **inputs).logits


@pytest.mark.parametrize("width", [96, 48])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_parameters_are_those_of_standard_attention(kind, width):
    config = LlamaConfig(
        vocab_size=11, hidden_size=width, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4
    )
    options = {"fixed_ids": (1,) * MAX} if kind == "fixed_seq_qk" else {}
    settings = AttentionVariantConfig(kind=kind, max_len=MAX, **options)
    found = parameter_report(build_hybrid(config, settings, "even"))
    assert found["1"] == found["2"] == 4 * width**2  # exact for the MLP too, as 3 divides the width
    assert found["total"] == parameter_report(build_hybrid(config, "standard"))["total"]


@pytest.mark.parametrize(("width", "inner", "off"), [(512, 683, 512), (1024, 1365, -1024), (896, 1195, 896)])
def test_width_of_the_mlp_at_the_sizes_of_the_paper(width, inner, off):
    from eff_attention.variants.mixers import inner_width

    assert inner_width(4 * width**2, width) == inner
    assert 3 * width * inner - 4 * width**2 == off
    assert abs(off) < 0.002 * 4 * width**2


def test_parameters_that_cannot_be_matched_raise():
    config = LlamaConfig(vocab_size=11, hidden_size=16, intermediate_size=8, num_attention_heads=2, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"1024 parameters .* within 0\.2 %: inner width 21 is off by -1\.56%"):
        build_hybrid(config, "mlp")
    assert parameter_report(build_hybrid(config, "mlp", match_params=False))["1"] == 3 * 16 * 21


@pytest.mark.parametrize("layout", ["uniform", "even"])
@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_do_not_reach_earlier_ones(kind, layout):
    model, ids = make(kind, layout), tokens()
    other = ids.clone()
    other[:, 7:] = other[:, 7:] % 60 + 1
    assert torch.equal(logits(model, ids)[:, :7], logits(model, other)[:, :7])
    assert not torch.equal(logits(model, ids)[:, 7:], logits(model, other)[:, 7:])


@pytest.mark.parametrize("host", [LlamaConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("layout", ["uniform", "odd"])
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_steps_give_the_full_pass(kind, layout, host):
    model, ids = make(kind, layout, host=host), tokens()
    parts, cache = [], DynamicCache()
    with torch.no_grad():
        parts += [
            model(input_ids=piece, **cache_kwargs(model, cache), use_cache=True).logits
            for piece in ids.split([6, 1, 1, 3, 2], 1)
        ]
    torch.testing.assert_close(torch.cat(parts, 1), logits(model, ids), rtol=0, atol=2e-5)
    assert cache.get_seq_length() == 13


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_of_the_cache(kind):
    model, ids = make(kind, heads=HEADS), tokens(3, 10)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=ids, use_cache=True, **cache_kwargs(model, cache))
    layer, head = cache.layers[0], WIDTH // HEADS
    features = 1 + head + head * (head + 1) // 2
    kept = [t for t in (getattr(layer, "state", None), layer.keys, layer.values) if t is not None]
    wanted = {
        "standard": 2 * 3 * 10 * WIDTH,
        "static_emb_qk": 2 * 3 * 10 * WIDTH,
        "mlp": 0,
        "approximate": 3 * HEADS * features * (head + 1),
        "non_approximate": 3 * (WIDTH + 2 * HEADS),
        "rnd_emb_qk": 3 * 10 * WIDTH,  # the keys, of one row for the whole batch, are kept with the model
        "fixed_seq_qk": 3 * 10 * WIDTH,
    }
    assert sum(t.numel() for t in kept) == wanted[kind]
    if kind in STATIC:
        assert precompute_maps(model)[0][1].shape == (1, HEADS, MAX, head)


@pytest.mark.parametrize("layout", ["uniform", "even"])
@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_changes_nothing(kind, layout):
    model, ids = make(kind, layout), tokens(2, 9)
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = logits(model, padded, attention_mask=mask, position_ids=positions)[:, 4:]
    torch.testing.assert_close(found, logits(model, ids), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_with_padding_continues_each_row_as_alone(kind):
    model, short, long = make(kind, "even"), tokens(1, 5, seed=3), tokens(1, 8, seed=4)
    batch = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1), long])
    options = {"max_new_tokens": 6, "do_sample": False}
    found = model.generate(batch, attention_mask=(batch != 0).long(), **options)
    for row, prompt in zip(found, (short, long), strict=True):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert row[8:].tolist() == alone[0, prompt.size(1) :].tolist()
    beams = model.generate(long, num_beams=3, attention_mask=torch.ones_like(long), **options)
    assert beams.shape == (1, 14)


@pytest.mark.parametrize("kind", STATIC)
def test_static_maps(kind):
    model, first, second = make(kind), tokens(1, seed=1), tokens(1, seed=2)
    maps, others = attention_maps(model, input_ids=first), attention_maps(model, input_ids=second)
    assert all(torch.equal(maps[i], others[i]) for i in (1, 2, 3, 4))
    assert all(not torch.allclose(maps[i], maps[j]) for i, j in itertools.combinations((1, 2, 3, 4), 2))
    ids = tokens(8)
    torch.testing.assert_close(logits(model, ids)[:1], logits(model, ids[:1]), rtol=0, atol=1e-5)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    changed = attention_maps(model, input_ids=first)
    assert torch.equal(changed[1], maps[1])  # the map of a layer depends on the layers before it
    assert not torch.allclose(changed[2], maps[2])


@pytest.mark.parametrize("kind", STATIC)
def test_the_sequence_behind_a_map_may_run_as_row_of_the_batch(kind):
    model, ids = make(kind, "even"), tokens(3)
    decoder, length = decoder_of(model), ids.size(1)
    stream = decoder.variant_stream[:length]
    first = decoder.embed_tokens(stream) if kind == "fixed_seq_qk" else stream
    hidden = torch.cat([first.unsqueeze(0), decoder.embed_tokens(ids)])
    rotation = decoder.rotary_emb(hidden, torch.arange(length).unsqueeze(0))
    with torch.no_grad():
        for i, layer in enumerate(decoder.layers):  # row 0 gives the map of all rows
            context = VariantContext()
            if hasattr(layer.self_attn, "settings"):
                q, k = layer.self_attn.query_key(layer.input_layernorm(hidden[:1]), rotation)
                context.maps[i] = q, k
            hidden = layer(hidden, position_embeddings=rotation, variant_context=context)
        wanted = decoder(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(decoder.norm(hidden[1:]), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", STATIC)
def test_training_and_inference_agree_and_gradients_reach_the_projections(kind):
    model, ids = make(kind, "even"), tokens()
    trained = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(trained.detach(), logits(model, ids), rtol=0, atol=1e-5)
    trained.square().sum().backward()
    mixer = model.model.layers[2].self_attn
    assert all(p.grad.abs().max() > 0 for p in (mixer.q_proj.weight, mixer.k_proj.weight))
    assert model.model.layers[1].self_attn.q_proj.weight.grad.abs().max() > 0
    partial = stream_maps(decoder_of(model), 5)[2][0]
    torch.testing.assert_close(precompute_maps(model)[2][0][:, :, :5], partial.detach(), rtol=0, atol=1e-5)


def test_inputs_longer_than_the_maps_raise():
    with pytest.raises(ValueError, match="max_len=24 tokens, got 25"):
        logits(make("rnd_emb_qk"), tokens(1, 25))


def test_maps_of_embeddings():
    model, standard, ids = make("static_emb_qk"), make("standard"), tokens(1)
    standard.load_state_dict(model.state_dict())
    maps, wanted = attention_maps(model, input_ids=ids), attention_maps(standard, input_ids=ids)
    torch.testing.assert_close(maps[1], wanted[1], rtol=0, atol=1e-6)  # at the first layer the states are embeddings
    assert not torch.allclose(maps[3], wanted[3], atol=1e-3)
    with torch.no_grad():  # what earlier layers do has no say
        model.model.layers[1].mlp.down_proj.weight.mul_(2)
    assert torch.equal(attention_maps(model, input_ids=ids)[3], maps[3])
    ids[0, 5] = ids[0, 2]  # the same token at two places: swapping them changes nothing
    swapped = ids[:, [0, 1, 5, 3, 4, 2, *range(6, 13)]]
    assert torch.equal(logits(model, ids), logits(model, swapped))


def test_mlp_sees_its_own_token_alone():
    model, ids = make("mlp", heads=HEADS), tokens(1)
    other = tokens(1, seed=5)
    other[0, 6] = ids[0, 6]
    torch.testing.assert_close(logits(model, ids)[0, 6], logits(model, other)[0, 6], rtol=0, atol=1e-6)


def test_rotation_has_no_effect_on_scores_of_one_position():
    from eff_attention.variants.mixers import rotate

    q, k = torch.randn(2, 1, 4, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angle = torch.arange(9.0, dtype=torch.float64).outer(torch.rand(6, dtype=torch.float64)).repeat(1, 2).unsqueeze(0)
    rotation = angle.cos(), angle.sin()
    turned = (rotate(q, rotation) * rotate(k, rotation)).sum(-1)
    torch.testing.assert_close(turned, (q * k).sum(-1), rtol=0, atol=1e-6)
    assert not torch.allclose(rotate(q, rotation), q)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_saving_and_loading(kind, tmp_path):
    model, ids = make(kind, "even", host=LlamaConfig if kind == "mlp" else Qwen3Config, heads=HEADS), tokens()
    model.save_pretrained(tmp_path)
    again = load_hybrid(tmp_path)
    assert variant_layers(again) == variant_layers(model)
    assert set(variant_layers(model)) == {1, 3}
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_bfloat16_and_copies(kind):
    model, ids = make(kind, "even"), tokens()
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, ids), logits(model, ids))
    wanted = logits(model, ids)
    error = (logits(copied.bfloat16(), ids).float() - wanted).norm() / wanted.norm()
    assert error < 0.05
    assert torch.equal(logits(model, ids), wanted)


@pytest.mark.parametrize("kind", ["approximate", "non_approximate", "static_emb_qk"])
def test_compiles(kind):
    model, ids = make(kind, "even", layers=2), tokens()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, ids), logits(model, ids), rtol=0, atol=1e-5)


def test_no_tokens():
    for kind in KINDS[1:]:
        mixer = make(kind).model.layers[0].self_attn
        hidden = torch.zeros(2, 0, WIDTH)
        empty = torch.zeros(1, HEADS, 0, WIDTH // HEADS), torch.zeros(1, 2, 0, WIDTH // HEADS)
        context = VariantContext(embeddings={0: hidden}, maps={0: empty})
        assert mixer(hidden, variant_context=context)[0].shape == (2, 0, WIDTH)


def test_skipping_is_undone():
    model, ids = make("approximate", "even"), tokens()
    before = logits(model, ids)
    with skip_layers(model, variant_layers(model)):
        skipped = logits(model, ids)
    assert not torch.allclose(skipped, before)
    assert torch.equal(logits(model, ids), before)
    with pytest.raises(ValueError, match="outside of 1 to 4"):
        skip_layers(model, [5])


def test_errors():
    model = make("approximate", "even")
    settings = AttentionVariantConfig(kind="rnd_emb_qk")
    with pytest.raises(ValueError, match="layer 1 has the mixer 'approximate' already"):
        swap_layers_(model, {1: settings})
    with pytest.raises(ValueError, match=r"layers \[9\] are outside of 1 to 4"):
        swap_layers_(model, {9: settings})
    with pytest.raises(ValueError, match="settings for 2 of them"):
        swap_layers_(model, {2: settings, 4: AttentionVariantConfig(kind="rnd_emb_qk", random_seed=1)})
    with pytest.raises(ValueError, match="3-dimensional"):
        logits(model, tokens(), attention_mask=torch.ones(2, 13, 13))
    with pytest.raises(ValueError, match="packed sequences"):
        logits(model, tokens(), position_ids=torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5]]))
    with pytest.raises(ValueError, match="no layer of the model has a static map"):
        precompute_maps(model)
    assert "2 changed, 0 skipped" not in str(swap_layers_(model, {2: AttentionVariantConfig(kind="standard")}))


def test_uniform_self_gating_without_norms_warns():
    config = LlamaConfig(vocab_size=11, hidden_size=12, intermediate_size=8, num_attention_heads=2, num_hidden_layers=2)
    with pytest.warns(UserWarning, match="qk_norm=True"):
        build_hybrid(config, "non_approximate", "uniform")
