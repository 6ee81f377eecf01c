"""Layer reuse over pages: as in transformers, for each request by its own length, whatever else is in the batch."""

import json

import pytest
import torch
from eff_attention.layer_reuse import LayerReuseConfig, LayerReusePolicy, apply_layer_reuse
from eff_kernels.edit.caches import cache_kwargs
from eff_serve.engine import EngineConfig, load_engine
from eff_serve.engine.decoder import PAGE, Decoder
from eff_serve.engine.reuse import LayerReuse, read_reuse

POLICY = LayerReusePolicy(kind=("full", "anchor", "reuse"), source=(-1, -1, 1), score=1.0, meta={})
SETTINGS = LayerReuseConfig(top_k=96, block_size=32, min_seq_len=96)
POOLED = LayerReuseConfig(top_k=96, block_size=32, min_seq_len=96, selector="pooled")
LENGTHS = (200, 150, 60)
STEPS = 3


def tokens_of(length):
    return torch.randint(3, 131, (length + STEPS,), generator=torch.Generator().manual_seed(length))


def decoder_of(folder, *, reuse=True, settings=SETTINGS):
    decoder = Decoder(folder, num_pages=24)
    if reuse:
        decoder.reuse = LayerReuse(POLICY, settings, num_layers=3, page=PAGE)
    return decoder


def decoded(decoder, lengths):
    """Logits of each step of a batch of prompts of these lengths, [steps, batch, vocab]."""
    tables = torch.randperm(24, generator=torch.Generator().manual_seed(0)).view(3, 8)[: len(lengths)]
    for length, table in zip(lengths, tables, strict=True):
        decoder.prefill(tokens_of(length)[:length], 0, table)
    steps = []
    for step in range(STEPS):
        positions = torch.tensor(lengths) + step
        tokens = torch.stack([tokens_of(n)[n + step] for n in lengths])
        steps.append(decoder.decode(tokens, positions, tables.to(torch.int32)))
    return torch.stack(steps)


@pytest.mark.parametrize("settings", [SETTINGS, POOLED], ids=["exact", "pooled"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_logits_equal_transformers_with_the_same_policy(tiny_model, name, settings):
    from transformers import AutoModelForCausalLM, DynamicCache

    folder = tiny_model(name)
    dense = decoded(decoder_of(folder, reuse=False), LENGTHS)
    actual = decoded(decoder_of(folder, settings=settings), LENGTHS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with apply_layer_reuse(model, POLICY, settings), torch.no_grad():
        for row, length in enumerate(LENGTHS):
            cache, tokens = DynamicCache(config=model.config), tokens_of(length)[None]
            model(tokens[:, :length], **cache_kwargs(model, cache))
            for step in range(STEPS):
                wanted = model(tokens[:, length + step : length + step + 1], **cache_kwargs(model, cache)).logits[0, 0]
                torch.testing.assert_close(actual[step, row], wanted, rtol=1e-4, atol=1e-4)
    changed = (actual - dense).abs().amax((0, 2))
    assert (changed[:2] > 1e-2).all()
    assert changed[2] == 0  # shorter than min_seq_len


@pytest.mark.parametrize("settings", [SETTINGS, POOLED], ids=["exact", "pooled"])
def test_a_sequence_does_not_depend_on_the_rest_of_its_batch(tiny_model, settings):
    folder = tiny_model("llama")
    together = decoded(decoder_of(folder, settings=settings), LENGTHS)
    for row, length in enumerate(LENGTHS):
        assert torch.equal(decoded(decoder_of(folder, settings=settings), (length,))[:, 0], together[:, row])


@pytest.mark.parametrize("block", [32, 64])
def test_sums_of_pages_are_those_of_their_keys(tiny_model, block):
    """After prompts in pieces, on pages that held others before, and with steps of other sequences between."""
    settings = LayerReuseConfig(top_k=192, block_size=block, min_seq_len=192, selector="pooled")
    decoder, fresh = (decoder_of(tiny_model("llama"), settings=settings) for _ in range(2))
    decoded(decoder, (210, 190, 230))
    tables = torch.arange(24).view(3, 8)
    tokens = tokens_of(200)
    for first, last in ((0, 40), (40, 64), (64, 200)):
        decoder.prefill(tokens[first:last], first, tables[1])
    decoder.prefill(tokens_of(10)[:10], 0, tables[0])
    fresh.prefill(tokens[:200], 0, tables[1])
    for step in range(STEPS):
        actual, wanted = (
            d.decode(tokens[200 + step][None], torch.tensor([200 + step]), tables[1:2].int()) for d in (decoder, fresh)
        )
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    sums, keys = decoder.reuse.sums[1], decoder.keys[1]
    for i, page in enumerate(tables[1].tolist()):
        held = min(max(200 + STEPS - i * PAGE, 0), PAGE)
        if held:
            torch.testing.assert_close(sums[page], keys[page, :, :held].sum(1), rtol=1e-5, atol=1e-5)
    assert list(decoder.reuse.sums) == [1]


def test_all_keys_are_dense(tiny_model):
    folder = tiny_model("llama")
    settings = LayerReuseConfig(top_k=256, block_size=64, min_seq_len=256)
    actual = decoded(decoder_of(folder, settings=settings), LENGTHS)
    assert torch.equal(actual, decoded(decoder_of(folder, reuse=False), LENGTHS))


def test_engine_counts_requests_that_reuse(tiny_model, make_engine, ask, tokenizer_file):
    engine = make_engine(decoder_of(tiny_model("llama")), tokenizer_file=tokenizer_file)
    seen = []
    decode = engine.decoder.decode

    def watched(*args):
        seen.append(engine.stats().reusing)
        return decode(*args)

    engine.decoder.decode = watched
    prompts = [tokens_of(n)[:n].tolist() for n in (150, 40)]
    settings = {"max_tokens": 5, "temperature": 0.0, "ignore_eos": True}
    together = ask(engine, [(p, settings) for p in prompts])
    assert max(seen) == 1
    for prompt, steps in zip(prompts, together, strict=True):
        alone = ask(engine, [(prompt, settings)])[0]
        assert [s.token for s in alone] == [s.token for s in steps]
    assert engine.stats().reusing == 0


def saved(tmp_path, **changes):
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({**POLICY.to_dict(), **changes}))
    return path


def test_settings_come_from_the_file_or_the_flags(tmp_path):
    path = saved(tmp_path, meta={"block_size": 64, "top_k": 512, "shared_heads": True})
    options = {"num_layers": 3, "page": PAGE}
    found = read_reuse(path, top_k=None, min_seq_len=None, **options)
    assert found.config == LayerReuseConfig(top_k=512, block_size=64, min_seq_len=2048, shared_heads=True)
    found = read_reuse(path, top_k=4096, min_seq_len=None, **options)
    assert found.config == LayerReuseConfig(top_k=4096, block_size=64, min_seq_len=4096, shared_heads=True)
    found = read_reuse(path, top_k=None, min_seq_len=700, **options)
    assert found.config.min_seq_len == 700
    assert read_reuse(path, top_k=None, min_seq_len=None, selector="pooled", **options).config.selector == "pooled"
    path = saved(tmp_path, meta={"selector": "pooled"})
    assert read_reuse(path, top_k=None, min_seq_len=None, **options).config.selector == "pooled"
    path = saved(tmp_path, meta={"block_size": 64, "top_k": 512, "shared_heads": True})
    found = read_reuse(path, top_k=None, min_seq_len=700, **options)
    assert str(found) == "layer reuse in 1 of 3 layers: 512 keys beyond 700"


def test_refusals(tmp_path, tiny_model):
    options = {"top_k": None, "min_seq_len": None, "page": PAGE}
    with pytest.raises(ValueError, match="has 3 layers, the model 4"):
        read_reuse(saved(tmp_path), num_layers=4, **options)
    with pytest.raises(ValueError, match="block_size=48 of layer reuse must be a multiple of 32"):
        read_reuse(saved(tmp_path, meta={"block_size": 48, "top_k": 480}), num_layers=3, **options)
    for meta in ({"selector": "hash"}, {"phase": "both"}):
        with pytest.raises(ValueError, match="eff-serve has the selectors 'exact' and 'pooled'"):
            read_reuse(saved(tmp_path, meta=meta), num_layers=3, **options)
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.json", "missing.json"):
        with pytest.raises(ValueError, match=f"{name} is not a policy of layer reuse"):
            read_reuse(tmp_path / name, num_layers=3, **options)
    with pytest.raises(ValueError, match="need a policy"):
        load_engine(EngineConfig(model=str(tiny_model("llama")), reuse_top_k=128), progress=False)
