"""PAINT in nine families of picture-language models, against selection and softmax written out."""

import copy
import math
import pickle
import threading

import pytest
import torch
from eff_attention.grounded_attention import (
    PAIConfig,
    PAINTConfig,
    apply_paint,
    cls_patch_attention,
    informed_tokens_in,
    local_tokens,
    received_attention,
    summary_tokens,
)
from eff_attention.visual_sinks import VARConfig, apply_var
from eff_kernels.edit.attention import (
    attend_explicit,
    decoder_attention,
    find_attention,
    intercept_attention,
    observe_attention,
)
from eff_kernels.edit.caches import cache_kwargs
from transformers import DynamicCache

CLS = ("Llava", "LlavaNext", "InternVL")
PROMPTS = [(1, 5, "P", 6, 7, 8), (1, "P", 9, "P", 10, 11, 12, 13, 14)]
ONE_EACH = [(1, 5, "P", 6, 7, 8), (1, "P", 9, 10, 11, 12, 13, 14)]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "suppress_tokens": [95, 96]}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def settings(family, **more):
    return PAINTConfig(saliency="cls" if family in CLS else "received", first_layer=1, **more)


def tower_maps(model, inputs):
    """Whole maps of the first and the last but one layer of the tower, one for each call."""
    names = [f.name for f in find_attention(model) if f.way and f.name not in decoder_attention(model)]
    seen = {0: [], 1: []}
    for place, name in enumerate((names[0], names[-2])):
        observe_attention(
            model, lambda c, o, place=place: seen[place].append(attend_explicit(c, weights=True).weights), where=name
        )
    model(**inputs)
    return seen


def qwen_places(windows):
    """Where each token of a picture of 2 x 3 tokens stands in the tower: in windows of 2 x 2 for Qwen2.5-VL."""
    cells = [(r, c) for r in range(2) for c in range(3)]
    order = sorted(cells, key=lambda cell: (cell[1] // 2, cell)) if windows else cells
    return [order.index(cell) for cell in cells]


def expected(zoo, family, model, inputs, config):
    """Local and summary tokens [B, T], picture by picture and patch by patch."""
    seen = tower_maps(copy.deepcopy(model), inputs)
    ids, prefix = inputs["input_ids"], 1 if family in CLS else 0
    score = received_attention if config.saliency == "received" else cls_patch_attention
    local, summary = (torch.zeros_like(ids, dtype=torch.bool) for _ in range(2))
    picture = ids == zoo.image
    if family.startswith("Qwen"):
        per = [torch.cat([score(m, 0)[0] for m in seen[i]]) for i in (0, 1)]
        first, late = (x.view(-1, 6, 4).amax(-1)[:, qwen_places(family == "Qwen2_5_VL")] for x in per)
        tokens = picture.nonzero().view(-1, 6, 2)
    else:
        first, late = (score(seen[i][0], prefix) for i in (0, 1))
        received = received_attention(seen[0][0], prefix)
        if family == "LlavaNext":
            tokens = picture.nonzero().view(-1, 52, 2)
        else:
            side = math.isqrt(first.shape[1])
            count = int(picture.sum()) // len(first)
            small = math.isqrt(count)
            tokens = picture.nonzero().view(-1, count, 2)
            blocks = [x.view(-1, small, side // small, small, side // small) for x in (first, late, received)]
            first, late, received = (b.permute(0, 1, 3, 2, 4).flatten(3).amax(-1).flatten(1) for b in blocks)
    chosen = [local_tokens(first, config.local_ratio), summary_tokens(late, config.summary_iqr)]
    if config.spatial_ratio:
        chosen[0] = chosen[0] | local_tokens(received, config.spatial_ratio)
    chosen[0] = chosen[0] & ~chosen[1]
    for mask, marks in zip((local, summary), chosen, strict=True):
        if family == "LlavaNext":  # three tiles: the whole, left, right; then lines of eight with a separator
            for n, some in enumerate(marks.view(-1, 3, 4, 4)):
                lines = torch.cat([some[1], some[2], torch.zeros(4, 1, dtype=torch.bool)], 1)
                marks_here = torch.cat([some[0].flatten(), lines.flatten()])
                for (b, t), mark in zip(tokens[n].tolist(), marks_here.tolist(), strict=True):
                    mask[b, t] = mark
        else:
            for (b, t), mark in zip(tokens.reshape(-1, 2).tolist(), marks.flatten().tolist(), strict=True):
                mask[b, t] = mark
    return local, summary


def by_rows(model, local, summary, config, last=-1):
    """The last row of each layer's logits raised key by key."""

    def rule(call, attend):
        out = attend(call).out
        if call.layer < config.first_layer:
            return out
        out = out.clone()
        groups = call.num_heads // call.num_kv_heads
        added = call.additive_mask()[:, 0, last]
        for b in range(len(out)):
            for h in range(call.num_heads):
                e = (call.k[b, h // groups].double() @ call.q[b, h, last].double()) * call.scale + added[b % len(added)]
                for j in range(call.num_keys):
                    if e[j] > -1e30 and j < local.shape[1]:
                        e[j] += (config.alpha * local[b, j] + config.beta * summary[b, j]) * abs(e[j])
                out[b, h, last] = (e.softmax(-1) @ call.v[b, h // groups].double()).to(out)
        return out

    return intercept_attention(model, rule, where=decoder_attention(model))


@torch.no_grad()
@pytest.mark.parametrize("spatial", [0.0, 0.1])
def test_tokens_and_logits(zoo, family, spatial):
    if spatial and family not in CLS:
        return
    model, inputs = zoo(family), zoo.ask(family, *PROMPTS)
    config = settings(family, spatial_ratio=spatial, summary_iqr=0.5)
    local, summary = expected(zoo, family, model, inputs, config)
    assert local.any(1).all()
    with by_rows(model, local, summary, config):
        wanted = model(**inputs).logits
    before = model(**inputs).logits
    with apply_paint(model, config) as handle:
        out = model(**inputs, use_cache=True)
        found = informed_tokens_in(out.past_key_values)
        shown = handle.tokens(inputs)
    assert torch.equal(found.local, local)
    assert torch.equal(found.summary, summary)
    assert torch.equal(shown.local, local)
    assert (out.logits[:, -1] - wanted[:, -1]).norm() < 1e-4 * wanted[:, -1].norm()
    assert (out.logits[:, -1] - before[:, -1]).norm() > 1e-3 * before[:, -1].norm()
    assert torch.equal(model(**inputs).logits, before)
    assert "get_image_features" not in vars(model.base_model)


@torch.no_grad()
def test_other_rows_are_bit_identical_in_the_first_layer(zoo):
    model, inputs = zoo("Llava"), zoo.ask("Llava", *ONE_EACH)
    seen = []
    names = decoder_attention(model)
    with observe_attention(model, lambda c, o: seen.append(o.out), where=names[2]):
        model(**inputs)
        with apply_paint(model):
            model(**inputs)
    assert torch.equal(seen[0][:, :, :-1], seen[1][:, :, :-1])
    assert not torch.equal(seen[0][:, :, -1], seen[1][:, :, -1])
    plain, begin = model(**inputs).logits, int(inputs["attention_mask"][0].argmax())
    with apply_paint(model):  # the last token is seen by no other
        assert torch.equal(model(**inputs).logits[0, begin:-1], plain[0, begin:-1])
    with apply_paint(model, PAINTConfig(rows="all_text")):
        found = model(**inputs).logits[0]
    end = inputs["input_ids"][0].eq(zoo.image).nonzero().max() + 1
    torch.testing.assert_close(found[begin:end], plain[0, begin:end], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[end], plain[0, end], atol=1e-5)


@torch.no_grad()
def test_strength_zero_and_text_are_bit_identical(zoo, family):
    model, inputs, text = zoo(family), zoo.ask(family, *PROMPTS), zoo.ask(family, (1, 5, 6), (1, 7, 8))
    before, tokens, words = model(**inputs).logits, model.generate(**inputs, **GREEDY), model(**text).logits
    with apply_paint(model, settings(family, alpha=0.0, beta=0.0)):
        assert torch.equal(model(**inputs).logits, before)
        assert torch.equal(model.generate(**inputs, **GREEDY), tokens)
    with apply_paint(model, settings(family)):
        assert torch.equal(model(**text).logits, words)
    assert torch.equal(model(**inputs).logits, before)


@torch.no_grad()
def test_a_row_is_as_it_is_alone(zoo, family):
    model, prompts = zoo(family), [*PROMPTS, (1, 20, 21, 22)]
    inputs = zoo.ask(family, *prompts)
    with apply_paint(model, settings(family, summary_iqr=0.5)):
        together = model(**inputs).logits
        for i, own in enumerate(zoo.each(family, prompts)):
            alone = model(**own).logits[0]
            gap = inputs["input_ids"].shape[1] - len(alone)
            assert (together[i, gap:] - alone).abs().max() < 1e-3 * alone.abs().max()


def generate(model, inputs, **more):
    return model.generate(**inputs, **GREEDY, **more)[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def test_generation(zoo, family):
    model, inputs = zoo(family), zoo.ask(family, *ONE_EACH)
    ids = inputs["input_ids"]
    config = settings(family, summary_iqr=0.5, alpha=2.0, beta=1.0)
    local, summary = expected(zoo, family, model, inputs, config)
    plain = generate(model, inputs)
    with by_rows(model, local, summary, config):
        wanted = generate(model, inputs)
    with apply_paint(model, config):
        found = generate(model, inputs)
        assert torch.equal(generate(model, inputs, cache_implementation="static", disable_compile=True), found)
        beams = generate(model, inputs, num_beams=2)
        for i, own in enumerate(zoo.each(family, ONE_EACH)):
            assert torch.equal(generate(model, own, num_beams=2)[0], beams[i])
    assert torch.equal(found, wanted)
    assert torch.equal(generate(model, inputs), plain)
    assert ids.shape == inputs["input_ids"].shape


@torch.no_grad()
def test_a_talk_goes_on(zoo):
    """A second picture in a cache is chosen from anew; the first keeps its tokens."""
    model = zoo("Llava")
    both = zoo.ask("Llava", (1, "P", 5, 6, 7, "P", 8))
    ids, pixels = both["input_ids"], both["pixel_values"]
    with apply_paint(model, PAINTConfig(summary_iqr=0.5)) as handle:
        wanted = handle.tokens(both)
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :19], pixel_values=pixels[:1], **cache_kwargs(model, cache))
        first = informed_tokens_in(cache)
        model(input_ids=ids[:, 19:20], **cache_kwargs(model, cache))
        model(input_ids=ids[:, 20:], pixel_values=pixels[1:], **cache_kwargs(model, cache))
        found = informed_tokens_in(cache)
        assert torch.equal(found.local, wanted.local)
        assert torch.equal(found.summary, wanted.summary)
        assert torch.equal(found.local[:, :19], first.local)
        with pytest.raises(NotImplementedError, match="without their pictures"):
            model(input_ids=ids)
        changed = handle.tokens({**both, "pixel_values": pixels.flip(0) * 2})
        assert not torch.equal(changed.local, wanted.local)
        model.get_image_features(pixels[:1])  # pictures that no prompt follows
        assert torch.equal(handle.tokens(both).local, wanted.local)


@torch.no_grad()
def test_pieces_of_a_prompt_in_generate(zoo):
    model, inputs = zoo("Llava"), zoo.ask("Llava", (1, "P", 5, 6, 7, 8), (2, "P", 9, 10, 11, 12))
    with apply_paint(model, PAINTConfig(alpha=2.0)):
        wanted = generate(model, inputs)
        try:
            found = generate(model, inputs, prefill_chunk_size=19)
        except (ValueError, NotImplementedError):
            pytest.skip("this transformers does not read prompts with pictures in pieces")
        assert torch.equal(found, wanted)


@torch.no_grad()
def test_all_tokens_are_those_of_pai(zoo):
    model, inputs = zoo("Llava"), zoo.ask("Llava", *PROMPTS)
    with apply_paint(model, PAINTConfig(alpha=0.5, local_ratio=1.0, summary_iqr=None)):
        wanted = model(**inputs).logits
    with apply_paint(model, PAIConfig(alpha=0.5)) as handle:
        assert torch.equal(model(**inputs).logits, wanted)
        assert torch.equal(handle.tokens(inputs).local, inputs["input_ids"] == zoo.image)


@torch.no_grad()
def test_gains_of_heads(zoo):
    model, inputs = zoo("Llava"), zoo.ask("Llava", *PROMPTS)
    plain = model(**inputs).logits

    def run(gain, layer=2):
        seen = []
        watch = observe_attention(model, lambda c, o: seen.append(o.out), where=decoder_attention(model)[layer])
        with watch, apply_paint(model, PAINTConfig(head_gain=gain, last_layer=layer)):
            return model(**inputs).logits, seen[0]

    ones = ((1.0,) * 8,) * 4
    without, wanted = run("none"), run(ones)
    assert torch.equal(without[0], wanted[0])
    zero = run(((0.0,) * 8,) * 4)
    assert (zero[0] - plain).abs().max() < 1e-5 * plain.abs().max()
    one = run(((0, 0, 0, 1, 0, 0, 0, 0),) * 4)[1]
    assert torch.equal(one[:, 3], wanted[1][:, 3])
    others = [h for h in range(8) if h != 3]
    assert (one[:, others] - zero[1][:, others]).abs().max() == 0

    image, masses = inputs["input_ids"] == zoo.image, {}

    def look(call, output):
        weights = attend_explicit(call, weights=True).weights[:, :, -1]
        mass = torch.where(image[:, None], weights, 0.0).sum(-1)
        masses[call.layer] = (mass / mass.mean(-1, keepdim=True)).clamp(0.5, 1.5)

    with observe_attention(model, look, where=decoder_attention(model)[2]):
        model(**inputs)
    rated, own = (
        run("attention_mass")[1],
        torch.stack([run((tuple(row.tolist()),) * 4)[1][b] for b, row in enumerate(masses[2])]),
    )
    torch.testing.assert_close(rated, own, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(rated, wanted[1], atol=1e-5)


@torch.no_grad()
def test_gain_is_kept_for_later_tokens(zoo):
    model, inputs = zoo("Llava"), zoo.ask("Llava", *ONE_EACH)
    with apply_paint(model, PAINTConfig(head_gain="attention_mass", alpha=2.0)):
        found = generate(model, inputs)
        assert torch.equal(generate(model, inputs, cache_implementation="static", disable_compile=True), found)
        for i, own in enumerate(zoo.each("Llava", ONE_EACH)):
            assert torch.equal(generate(model, own)[0], found[i])


@torch.no_grad()
def test_rows_of_a_cache_change_places(zoo):
    model, inputs = zoo("Llava"), zoo.ask("Llava", (1, "P", 5, 6), (2, "P", 7, 8))
    step = torch.tensor([[9], [9]])
    with apply_paint(model):
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        for cache in caches:
            model(**inputs, **cache_kwargs(model, cache))
        wanted = model(input_ids=step, **cache_kwargs(model, caches[0])).logits
        caches[1].reorder_cache(torch.tensor([1, 0]))
        found = model(input_ids=step, **cache_kwargs(model, caches[1])).logits
        assert (found - wanted.flip(0)).norm() < 1e-5 * wanted.norm()
        assert torch.equal(informed_tokens_in(caches[1]).local, informed_tokens_in(caches[0]).local.flip(0))


@torch.no_grad()
def test_kernels_bfloat16_and_autocast(zoo):
    model, inputs = zoo("Llava"), zoo.ask("Llava", *PROMPTS)
    config = PAINTConfig(summary_iqr=None)
    with apply_paint(model, config):
        wanted = model(**inputs).logits[:, -1]
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(**inputs).logits[:, -1].float()
        model.set_attn_implementation("eager")
        assert (model(**inputs).logits[:, -1] - wanted).norm() < 1e-4 * wanted.norm()
        half = model.bfloat16()(**{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}).logits[:, -1].float()
    assert (mixed - wanted).norm() < 0.2 * wanted.norm()
    assert (half - wanted).norm() < 0.3 * wanted.norm()


@torch.no_grad()
def test_copies_pickles_threads_and_other_methods(zoo):
    model, inputs = zoo("Llava"), zoo.ask("Llava", *PROMPTS)
    handle = apply_paint(model)
    again = pickle.loads(pickle.dumps(model))  # before the hooks that transformers puts in with the first pass
    wanted, twin = model(**inputs).logits, copy.deepcopy(model)
    other, found = zoo.ask("Llava", (3, "P", 4), seed=3), []
    alone = model(**other).logits

    @torch.no_grad()
    def work(given, want):
        try:
            found.extend(torch.equal(model(**given).logits, want) for _ in range(3))
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in ((inputs, wanted), (other, alone))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [True] * 6
    with pytest.raises(ValueError, match="order"):
        apply_var(model, VARConfig(dims=(7,), tau=6.0))
    with pytest.raises(ValueError, match="order"):
        apply_paint(model)
    assert torch.equal(model(**inputs).logits, wanted)  # a failed try leaves nothing behind
    handle.remove()
    plain = model(**inputs).logits
    assert not torch.equal(plain, wanted)
    assert torch.equal(twin(**inputs).logits, wanted)
    assert torch.equal(again(**inputs).logits, wanted)
    assert twin.base_model.get_image_features.module is twin.base_model
    with apply_paint(model, order=1), apply_var(model, VARConfig(dims=tuple(range(20)), tau=2.2), order=2):
        both = model(**inputs).logits
    assert not torch.equal(both, wanted)
    assert torch.equal(model(**inputs).logits, plain)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.model.language_model.modules())


def test_towers_without_a_class_token(zoo, family):
    model = zoo(family)
    if family in CLS:
        apply_paint(model).remove()
        return
    with pytest.raises(ValueError, match="no class token"):
        apply_paint(model)
    assert "get_image_features" not in vars(model.base_model)
    apply_paint(model, PAINTConfig(saliency="received")).remove()
