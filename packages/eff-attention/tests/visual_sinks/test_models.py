"""VAR in nine families of picture-language models, with sinks that were planted."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from eff_attention.sink_calibration import ACTConfig, apply_act
from eff_attention.visual_sinks import VARConfig, apply_var, find_sink_dims, known_sink_dims, visual_sinks_in
from eff_kernels.edit.caches import cache_kwargs
from transformers import DynamicCache

CONFIG = VARConfig(dims=(7,), tau=6.0)
PROMPTS = [(1, 5, "P", 6, 7, 8), (1, "P", 9, "P", 10, 11, 12, 13, 14)]
ONE_EACH = [(1, 5, "P", 6, 7, 8), (1, "P", 9, 10, 11, 12, 13, 14)]  # beams repeat pictures, not groups of them
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "suppress_tokens": [95, 96]}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def places(zoo, ids, *which):
    """Places of the first token of each row that is no padding, if asked for, and of some picture tokens."""
    out = []
    for row in ids:
        at = (row == zoo.image).nonzero()[:, 0].tolist()
        out.append([int((row != 0).long().argmax()) if w == "first" else at[w] for w in which])
    return out


def marked(ids, where):
    sinks = torch.zeros_like(ids, dtype=torch.bool)
    for row, some in enumerate(where):
        sinks[row, some] = True
    return sinks


@torch.no_grad()
def test_planted_sinks_are_found_and_their_weight_moves(zoo, family, plant, by_rows):
    model, inputs = zoo(family), zoo.ask(family, *PROMPTS)
    where = places(zoo, inputs["input_ids"], "first", 1)
    plant(model, where)
    assert find_sink_dims(model, inputs, layers=[2], tau=6.0) == [7]
    before = model(**inputs).logits
    sinks, image = marked(inputs["input_ids"], where), inputs["input_ids"] == zoo.image
    with by_rows(model, sinks, image):
        wanted = model(**inputs).logits
    with apply_var(model, CONFIG) as handle:
        out = model(**inputs, use_cache=True)
        found = out.logits
        stats = handle.stats()
        assert torch.equal(visual_sinks_in(out.past_key_values)[2], sinks)
    assert list(visual_sinks_in(out.past_key_values)) == [2]  # the first two layers and the last are left alone
    real = inputs["attention_mask"].bool()
    assert (found - wanted)[real].norm() < 1e-4 * wanted[real].norm()
    assert (found - before)[real].norm() > 1e-3 * before[real].norm()
    assert (stats[0].layer, stats[0].visual_sinks, stats[0].text_sinks) == (2, 1.0, 1.0)
    assert 0 < stats[0].heads <= 1
    assert 0 < stats[0].moved <= 0.6
    assert torch.equal(model(**inputs).logits, before)


@torch.no_grad()
def test_a_row_is_as_it_is_alone(zoo, family, plant):
    model = zoo(family)
    prompts = [*PROMPTS, (1, 20, 21, 22)]
    inputs = zoo.ask(family, *prompts)
    ids = inputs["input_ids"]
    where = [*places(zoo, ids[:2], "first", 2), []]
    watch = plant(model, where)
    with apply_var(model, CONFIG) as handle:
        together = model(**inputs).logits
        for i, own in enumerate(zoo.each(family, prompts)):
            gap = ids.shape[1] - own["input_ids"].shape[1]
            watch.places = [[p - gap for p in where[i]]]
            alone = model(**own).logits[0]
            assert (together[i, gap:] - alone).abs().max() < 1e-3 * alone.abs().max()
        handle.remove()
        watch.places = [[]]
        assert (alone - model(**own).logits[0]).abs().max() == 0  # no picture: the host's own


@torch.no_grad()
def test_nothing_to_do_is_bit_identical(zoo, family, plant):
    model, inputs = zoo(family), zoo.ask(family, *PROMPTS)
    before = model(**inputs).logits
    with apply_var(model, CONFIG) as handle:  # no sinks
        assert torch.equal(model(**inputs).logits, before)
    plant(model, places(zoo, inputs["input_ids"], "first", 1))
    before = model(**inputs).logits
    for idle in (VARConfig(dims=(7,), tau=6.0, p=0.0), VARConfig(dims=(8,), tau=7.9)):
        with apply_var(model, idle):
            assert torch.equal(model(**inputs).logits, before)
    with apply_var(model, VARConfig(dims=(7,), tau=6.0, min_image_mass=1.0)) as handle:  # no head looks
        found = model(**inputs).logits
        assert handle.stats()[0].heads == 0
    assert (found - before).abs().max() < 1e-4 * before.abs().max()
    assert torch.equal(model(**inputs).logits, before)


@torch.no_grad()
def test_fewer_heads_as_limits_rise(zoo, plant):
    model, inputs = zoo("Llava"), zoo.ask("Llava", *PROMPTS)
    plant(model, places(zoo, inputs["input_ids"], 1))

    def share(**more):
        with apply_var(model, VARConfig(dims=(7,), tau=6.0, **more)) as handle:
            model(**inputs)
            return handle.stats()[0].heads

    for limits in ([{"rho": r} for r in (0.0, 0.5, 0.9, 1.0)], [{"min_image_mass": m} for m in (0.0, 0.3, 0.6, 1.0)]):
        shares = [share(**m) for m in limits]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] > shares[-1]


def generate(model, inputs, **more):
    return model.generate(**inputs, **GREEDY, **more)[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def test_generation(zoo, family, plant):
    model, inputs = zoo(family), zoo.ask(family, *ONE_EACH)
    ids, count = inputs["input_ids"], inputs["input_ids"].shape[1]
    where = places(zoo, ids, "first", 1)
    watch = plant(model, where)
    plain = generate(model, inputs)
    with apply_var(model, VARConfig(dims=(7,), tau=6.0, rho=0.0, p=1.0)):
        found = generate(model, inputs)
        assert torch.equal(generate(model, inputs, cache_implementation="static", disable_compile=True), found)
        # One pass over prompt and answer: the planted sinks are all that there is, and later rows follow the rule.
        longer = {**inputs, "input_ids": torch.cat([ids, found[:, :-1]], 1)}
        longer["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
        for kind in ("mm_token_type_ids", "token_type_ids"):
            if kind in inputs:
                longer[kind] = torch.nn.functional.pad(inputs[kind], (0, 4))
        if family != "PaliGemma":  # whose prompt sees itself whole
            assert torch.equal(model(**longer).logits[:, count - 1 :, :95].argmax(-1), found)
        beams = generate(model, inputs, num_beams=2)
        for i, own in enumerate(zoo.each(family, ONE_EACH)):
            gap = count - own["input_ids"].shape[1]
            watch.places = [[p - gap for p in where[i]]]
            assert torch.equal(generate(model, own, num_beams=2)[0], beams[i])
    assert plain.shape == found.shape


@torch.no_grad()
def test_prompts_in_pieces(zoo, plant):
    """Sinks of a prompt add up over its parts, pictures apart from each other included."""
    model, inputs = zoo("Llava"), zoo.ask("Llava", (1, "P", 5, 6, "P", 7, 8), (2, "P", 9, 10, "P", 11, 12))
    ids, pixel_values = inputs["input_ids"], inputs["pixel_values"]
    watch = plant(model, [[0, 2, 25], [3, 30]])
    with apply_var(model, CONFIG):
        whole = DynamicCache(config=model.config)
        wanted = model(**inputs, **cache_kwargs(model, whole)).logits[:, -1]
        cache = DynamicCache(config=model.config)
        for first, last, some in ((0, 18, (0, 2)), (18, 37, (1, 3))):
            watch.start = first
            out = model(
                input_ids=ids[:, first:last], pixel_values=pixel_values[list(some)], **cache_kwargs(model, cache)
            )
    assert torch.equal(visual_sinks_in(cache)[2], visual_sinks_in(whole)[2])
    assert visual_sinks_in(cache)[2].nonzero().tolist() == [[0, 0], [0, 2], [0, 25], [1, 3], [1, 30]]
    assert (out.logits[:, -1] - wanted).norm() < 1e-4 * wanted.norm()


@torch.no_grad()
def test_rows_of_a_cache_change_places_and_go(zoo, plant):
    model, inputs = zoo("Llava"), zoo.ask("Llava", (1, "P", 5, 6), (2, "P", 7, 8))
    plant(model, [[1], [2]])
    step = torch.tensor([[9], [9]])
    with apply_var(model, VARConfig(dims=(7,), tau=6.0, rho=0.0)):
        caches = [DynamicCache(config=model.config) for _ in range(3)]
        for cache in caches:
            model(**inputs, **cache_kwargs(model, cache))
        wanted = model(input_ids=step, **cache_kwargs(model, caches[0])).logits
        caches[1].reorder_cache(torch.tensor([1, 0]))
        found = model(input_ids=step, **cache_kwargs(model, caches[1])).logits
        assert (found - wanted.flip(0)).norm() < 1e-5 * wanted.norm()
        assert visual_sinks_in(caches[1])[2].nonzero().tolist() == [[0, 2], [1, 1]]
        caches[2].layers = caches[0].layers
        caches[2].batch_select_indices(torch.tensor([1]))
        model(input_ids=step[:1], **cache_kwargs(model, caches[2]))
        assert visual_sinks_in(caches[2])[2].nonzero().tolist() == [[0, 2]]
        other = DynamicCache(config=model.config)
        model(**zoo.ask("Llava", (3, "P", 9, 6), (4, "P", 7, 9), seed=5), **cache_kwargs(model, other))
        caches[1].layers = other.layers
        with pytest.raises(RuntimeError, match="other rows"):
            model(input_ids=step, **cache_kwargs(model, caches[1]))


@torch.no_grad()
def test_one_sink_of_one_row_is_found_exactly(zoo, plant):
    model, inputs = zoo("Llava"), zoo.ask("Llava", (1, "P", 5), (1, "P", 6))
    plant(model, [[9], []])
    before = model(**inputs).logits
    with apply_var(model, CONFIG):
        cache = DynamicCache(config=model.config)
        found = model(**inputs, **cache_kwargs(model, cache)).logits
    assert visual_sinks_in(cache)[2].nonzero().tolist() == [[0, 9]]
    assert not torch.equal(found[0], before[0])
    assert (found[1] - before[1]).abs().max() < 1e-4 * before.abs().max()
    assert torch.equal(found[0, :17], before[0, :17])  # queries up to the picture's end


@torch.no_grad()
def test_all_queries_and_the_last_layer(zoo, plant):
    model, inputs = zoo("Llava"), zoo.ask("Llava", (1, "P", 5, 6))
    plant(model, [[2]])
    before = model(**inputs).logits
    behind = slice(3, 17)  # queries of the picture behind the sink
    with apply_var(model, VARConfig(dims=(7,), tau=6.0, rho=0.0, rows="all")):
        assert not torch.equal(model(**inputs).logits[:, behind], before[:, behind])
    with apply_var(model, VARConfig(dims=(7,), tau=6.0, rho=0.0)):
        assert torch.equal(model(**inputs).logits[:, behind], before[:, behind])
    with apply_var(model, VARConfig(dims=(7,), tau=6.0, skip_last_layer=False)):
        cache = DynamicCache(config=model.config)
        model(**inputs, **cache_kwargs(model, cache))
    assert list(visual_sinks_in(cache)) == [2, 3]


@torch.no_grad()
def test_bfloat16_autocast_and_kernels(zoo, plant):
    model, inputs = zoo("Llava"), zoo.ask("Llava", *PROMPTS)
    plant(model, places(zoo, inputs["input_ids"], "first", 1))
    real = inputs["attention_mask"].bool()
    with apply_var(model, CONFIG):
        wanted = model(**inputs).logits[real]
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(**inputs).logits[real].float()
        model.set_attn_implementation("eager")
        assert (model(**inputs).logits[real] - wanted).norm() < 1e-4 * wanted.norm()
        half = model.bfloat16()(**{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}).logits[real].float()
    assert (mixed - wanted).norm() < 0.1 * wanted.norm()
    assert (half - wanted).norm() < 0.2 * wanted.norm()


@torch.no_grad()
def test_copies_pickles_threads_and_other_methods(zoo, plant):
    model, inputs = zoo("Llava"), zoo.ask("Llava", *PROMPTS)
    handle = apply_var(model, VARConfig(dims=tuple(range(20)), tau=2.2, rho=0.0))
    again = pickle.loads(pickle.dumps(model))  # before the hooks that transformers puts in with the first pass
    wanted, twin = model(**inputs).logits, copy.deepcopy(model)
    handle.remove()
    plain = model(**inputs).logits
    assert not torch.equal(wanted, plain)
    handle = apply_var(model, handle.config)
    assert torch.equal(again(**inputs).logits, wanted)
    with pytest.raises(ValueError, match="order"):
        apply_act(model, ACTConfig(layers=(2,)))
    other, found = zoo.ask("Llava", (3, "P", 4), seed=3), []
    alone = model(**other).logits

    @torch.no_grad()
    def work(given, want):
        found.extend(torch.equal(model(**given).logits, want) for _ in range(3))

    threads = [threading.Thread(target=work, args=pair) for pair in ((inputs, wanted), (other, alone))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [True] * 6
    handle.remove()
    assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(twin(**inputs).logits, wanted)
    both = []
    for _ in range(2):
        with apply_act(model, ACTConfig(layers=(2,)), order=1), apply_var(model, handle.config, order=2):
            both.append(model(**inputs).logits)
    assert torch.equal(*both)
    assert torch.equal(model(**inputs).logits, plain)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.model.language_model.modules())


def test_dims_that_are_known_and_that_are_not(zoo):
    import transformers

    model = zoo("Llava")
    assert known_sink_dims(model) is None
    with torch.device("meta"):
        config = transformers.LlamaConfig(num_hidden_layers=1, hidden_size=4096, vocab_size=32000)
        assert known_sink_dims(transformers.LlamaModel(config)) == (1415, 2533)
        config.vocab_size = 128256
        assert known_sink_dims(transformers.LlamaModel(config)) is None
    with pytest.raises(ValueError, match="no hidden dimension"):
        apply_var(model, VARConfig(tau=7.0))
    with pytest.raises(ValueError, match="can never fire"):
        apply_var(model, VARConfig())
    with pytest.raises(ValueError, match="dims="):
        apply_var(model, VARConfig(dims=(64,), tau=6.0))
    with pytest.raises(NotImplementedError, match="Linear"):
        apply_var(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"0\.\.3"):
        find_sink_dims(model, layers=[4])
    with pytest.raises(ValueError, match="tau"):
        find_sink_dims(model, tau=9.0)


def test_sinks_of_smollm2():
    """The first token of SmolLM2 is a sink as the paper describes it, and its dimensions are found without a prompt."""
    language = pytest.importorskip("eff_embedded.language")
    try:
        model, _ = language.load_smollm2()
    except (ImportError, FileNotFoundError):
        pytest.skip("SmolLM2's weights are not installed")
    with warnings.catch_warnings():
        dims = find_sink_dims(model)
    assert 1 <= len(dims) <= 8
    text = torch.arange(100, 140)[None]
    assert set(find_sink_dims(model, text)) & set(dims)
