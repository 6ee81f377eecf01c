"""VHR in nine families of picture-language models, against hooks on the output projections."""

import copy
import pickle
import threading

import pytest
import torch
from eff_attention.head_reinforcement import (
    VHRConfig,
    apply_vhr,
    chosen_heads,
    head_outputs,
    reject_negative_heads,
    select_heads,
    token_vhd,
    trace_tvhd,
    vhr_generate,
    vision_aware_divergence,
)
from eff_attention.sink_calibration import ACTConfig, apply_act
from eff_attention.visual_sinks import VARConfig, apply_var
from eff_kernels.edit.attention import decoder_attention
from eff_kernels.edit.caches import cache_kwargs
from transformers import DynamicCache

ALL = VHRConfig(layers=(0, 1, 2, 3))
PROMPTS = [(1, 5, "P", 6, 7, 8), (1, "P", 9, "P", 10, 11, 12, 13, 14)]
ONE_EACH = [(1, 5, "P", 6, 7, 8), (1, "P", 9, 10, 11, 12, 13, 14)]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "suppress_tokens": [95, 96]}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Projections:
    """Hooks before the output projections: scale heads [B, H] of some layers, and keep what comes in."""

    def __init__(self, model, alpha=2.0):
        self.heads, self.seen, self.alpha, self.hooks = {}, {}, alpha, []
        for layer, name in enumerate(decoder_attention(model)):
            projection = model.get_submodule(name).o_proj
            self.hooks.append(projection.register_forward_pre_hook(lambda m, a, layer=layer: self.at(layer, a[0])))

    def at(self, layer, x):
        x = x.unflatten(-1, (8, -1))
        self.seen[layer] = x
        if layer not in self.heads:
            return None
        return torch.where(self.heads[layer][:, None, :, None], self.alpha * x, x).flatten(2)

    def remove(self):
        for hook in self.hooks:
            hook.remove()


def bare(zoo, family, pieces):
    """A prompt without its pictures, separators kept."""
    with_picture = zoo.ask(family, pieces)["input_ids"][0].tolist()
    return zoo.ask(family, tuple(t for t in with_picture if t != zoo.image))


def by_hooks(zoo, family, model, prompts, alpha=2.0, layers=range(4), lockstep=False):
    """Heads by layer and logits, one layer after the other, each prompt without pictures alone."""
    inputs, hooks, heads = zoo.ask(family, *prompts), Projections(model, alpha), {}
    for layer in layers:
        there = []
        for row, pieces in enumerate(prompts):
            hooks.heads = {n: h[row : row + 1] for n, h in heads.items()} if lockstep else {}
            model(**bare(zoo, family, pieces))
            there.append(hooks.seen[layer][0, -1])
        hooks.heads = heads
        model(**inputs)
        here, there = hooks.seen[layer][:, -1], torch.stack(there)
        vhd = reject_negative_heads(vision_aware_divergence(here, there), there.square().sum(-1))
        heads = {**heads, layer: select_heads(vhd)}
    hooks.heads = heads
    logits = model(**inputs).logits
    hooks.remove()
    return heads, logits


@torch.no_grad()
@pytest.mark.parametrize("reference", ["plain", "lockstep"])
def test_heads_and_logits_are_those_of_hooks(zoo, family, reference):
    model, inputs = zoo(family), zoo.ask(family, *PROMPTS)
    heads, wanted = by_hooks(zoo, family, model, PROMPTS, lockstep=reference == "lockstep")
    before = model(**inputs).logits
    with apply_vhr(model, VHRConfig(layers=(0, 1, 2, 3), reference=reference)):
        out = model(**inputs, use_cache=True)
    found = chosen_heads(out.past_key_values)
    real = inputs["attention_mask"].bool()
    for layer in range(4):
        assert torch.equal(found[layer], heads[layer]), layer
    assert (out.logits - wanted)[real].norm() < 1e-4 * wanted[real].norm()
    assert (out.logits - before)[real].norm() > 1e-2 * before[real].norm()
    assert torch.equal(model(**inputs).logits, before)


@torch.no_grad()
def test_half_of_the_heads_are_chosen(zoo):
    model, inputs = zoo("Llava"), zoo.ask("Llava", *PROMPTS)
    with apply_vhr(model, VHRConfig(layers=(0, 1, 2, 3), outlier_filter=False)):
        found = chosen_heads(model(**inputs, use_cache=True).past_key_values)
    assert all((h.sum(-1) == 4).all() for h in found.values())
    with apply_vhr(model, VHRConfig()):
        assert list(chosen_heads(model(**inputs, use_cache=True).past_key_values)) == [1, 2, 3]


@torch.no_grad()
def test_a_head_that_looks_at_the_picture_is_found(zoo):
    """Heads 2 and 5 of layer 1 alone read what tokens have in dimensions that only pictures use."""
    model, inputs = zoo("Llava"), zoo.ask("Llava", (1, 5, "P", 6, 7))
    layer = model.model.language_model.layers[1]
    layer.self_attn.v_proj.weight.zero_()
    model.model.language_model.layers[0].self_attn.o_proj.weight.zero_()
    model.model.language_model.layers[0].mlp.down_proj.weight.zero_()
    model.model.language_model.embed_tokens.weight[:, 60:] = 0.0
    layer.self_attn.v_proj.weight[:, 60:] = torch.eye(16, 4)  # the first key-value head: query heads 0 to 3
    layer.self_attn.q_proj.weight[:] = 0.0
    layer.self_attn.k_proj.weight[:] = 0.0
    bos = model.model.language_model.embed_tokens.weight[1]
    layer.self_attn.k_proj.weight[0] = bos / bos.norm() ** 2 * 100  # it alone has a large key
    layer.self_attn.q_proj.weight[0::8][[0, 1, 3]] = 0.0
    with apply_vhr(model, VHRConfig(layers=(1,), outlier_filter=False)):
        found = chosen_heads(model(**inputs, use_cache=True).past_key_values)[1]
    assert not found[0, 4:].any()  # heads that never see it do not move
    outputs = head_outputs(model, inputs, [1])[1]
    assert (outputs[0, :4].norm(dim=-1) > 0).all()
    assert (outputs[0, 4:] == 0).all()


@torch.no_grad()
def test_without_effect_it_is_bit_identical(zoo, family):
    model, inputs = zoo(family), zoo.ask(family, *PROMPTS)
    before, tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    with apply_vhr(model, VHRConfig(alpha=1.0, layers=(0, 1, 2, 3))):
        assert torch.equal(model(**inputs).logits, before)
        assert torch.equal(model.generate(**inputs, **GREEDY), tokens)
    text = zoo.ask(family, (1, 5, 6, 7), (1, 8, 9))
    plain = model(**text).logits
    with apply_vhr(model, ALL), pytest.warns(UserWarning, match="no prompt has a picture"):
        assert torch.equal(model(**text).logits, plain)


@torch.no_grad()
def test_pictures_that_change_nothing_choose_nothing(zoo):
    model, inputs = zoo("Llava"), zoo.ask("Llava", (1, 5, "P", 6, 7))
    for layer in model.model.language_model.layers:
        layer.self_attn.v_proj.weight.zero_()
    before = model(**inputs).logits
    with apply_vhr(model, ALL):
        out = model(**inputs, use_cache=True)
    assert not any(h.any() for h in chosen_heads(out.past_key_values).values())
    assert torch.equal(out.logits, before)


@torch.no_grad()
def test_later_layers_are_measured_behind_stronger_ones(zoo):
    model, inputs = zoo("Llava"), zoo.ask("Llava", (1, 5, "P", 6, 7))

    def outputs(alpha):
        with apply_vhr(model, VHRConfig(alpha=alpha, layers=(0, 2))):
            return head_outputs(model, inputs, [2])[2]

    assert torch.equal(outputs(1.0), head_outputs(model, inputs, [2])[2])
    with apply_vhr(model, VHRConfig(alpha=2.0, layers=(0,))):
        behind = head_outputs(model, inputs, [2])[2]
    with apply_vhr(model, VHRConfig(alpha=2.0, layers=(0, 2))):
        heads = chosen_heads(model(**inputs, use_cache=True).past_key_values)[2]
    torch.testing.assert_close(outputs(2.0), torch.where(heads[..., None], 2 * behind, behind))
    assert not torch.allclose(behind, head_outputs(model, inputs, [2])[2], rtol=1e-2)


@torch.no_grad()
def test_a_row_is_as_it_is_alone(zoo, family):
    model, prompts = zoo(family), [*PROMPTS, (1, 20, 21, 22), (1, 6, "P", 9)]
    inputs = zoo.ask(family, *prompts)
    with apply_vhr(model, ALL) as handle:
        together = model(**inputs, use_cache=True)
        heads = chosen_heads(together.past_key_values)
        for i, own in enumerate(zoo.each(family, prompts)):
            if "P" not in prompts[i]:
                assert not any(h[i].any() for h in heads.values())
                continue
            alone = model(**own).logits[0]
            gap = inputs["input_ids"].shape[1] - len(alone)
            assert (together.logits[i, gap:] - alone).abs().max() < 1e-3 * alone.abs().max()
            assert all(torch.equal(h[0], heads[n][i]) for n, h in handle.heads(own).items())


def generate(model, inputs, **more):
    return model.generate(**inputs, **GREEDY, **more)[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def test_generation(zoo, family):
    model, inputs = zoo(family), zoo.ask(family, *ONE_EACH)
    count = inputs["input_ids"].shape[1]
    plain = generate(model, inputs)
    with apply_vhr(model, ALL) as handle:
        heads = handle.heads(inputs)
        found = generate(model, inputs)
        assert torch.equal(generate(model, inputs, cache_implementation="static", disable_compile=True), found)
        beams = generate(model, inputs, num_beams=2)
        for i, own in enumerate(zoo.each(family, ONE_EACH)):
            assert torch.equal(generate(model, own, num_beams=2)[0], beams[i])
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], found[:, :-1]], 1)}
    longer["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    for kind in ("mm_token_type_ids", "token_type_ids"):
        if kind in inputs:
            longer[kind] = torch.nn.functional.pad(inputs[kind], (0, 4))
    hooks = Projections(model)
    hooks.heads = heads
    if family != "PaliGemma":  # whose prompt sees itself whole
        assert torch.equal(model(**longer).logits[:, count - 1 :, :95].argmax(-1), found)
    hooks.remove()
    assert torch.equal(generate(model, inputs), plain)
    assert torch.equal(vhr_generate(model, inputs, ALL, **GREEDY)[:, count:], found)
    assert torch.equal(generate(model, inputs), plain)


@torch.no_grad()
def test_prompts_in_pieces_are_measured_ahead(zoo):
    model, inputs = zoo("Llava"), zoo.ask("Llava", (1, "P", 5, 6, 7, 8), (2, "P", 9, 10, 11, 12))
    ids = inputs["input_ids"]

    def read():
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :19], pixel_values=inputs["pixel_values"], **cache_kwargs(model, cache))
        out = model(input_ids=ids[:, 19:], **cache_kwargs(model, cache)).logits
        return out, chosen_heads(cache)

    with apply_vhr(model, ALL) as handle:
        wanted = model(**inputs, use_cache=True)
        with pytest.raises(RuntimeError, match="pieces"):
            read()
        with handle.generation(inputs) as heads:
            found, own = read()
        assert all(torch.equal(own[n], h) for n, h in heads.items())
        assert (found - wanted.logits[:, 19:]).norm() < 1e-5 * wanted.logits.norm()
        whole = chosen_heads(wanted.past_key_values)
        assert all(torch.equal(whole[n], h) for n, h in heads.items())
        cache = DynamicCache(config=model.config)  # a talk goes on: its heads stay
        out = model(**inputs, **cache_kwargs(model, cache))
        word = out.logits[:, -1:].argmax(-1)
        model(input_ids=word, **cache_kwargs(model, cache))
        model(input_ids=torch.tensor([[7, 8], [9, 4]]), **cache_kwargs(model, cache))
        assert all(torch.equal(chosen_heads(cache)[n], h) for n, h in heads.items())
        behind = DynamicCache(config=model.config)
        with pytest.warns(UserWarning, match="picture"):
            model(input_ids=ids[:, :1], **cache_kwargs(model, behind))
        with pytest.raises(RuntimeError, match="generation"):
            model(input_ids=ids[:, 1:], pixel_values=inputs["pixel_values"], **cache_kwargs(model, behind))


@torch.no_grad()
def test_rows_of_a_cache_change_places_and_go(zoo):
    model, inputs = zoo("Llava"), zoo.ask("Llava", (1, "P", 5, 6), (2, "P", 7, 8))
    step = torch.tensor([[9], [9]])
    with apply_vhr(model, ALL):
        caches = [DynamicCache(config=model.config) for _ in range(3)]
        for cache in caches:
            model(**inputs, **cache_kwargs(model, cache))
        wanted = model(input_ids=step, **cache_kwargs(model, caches[0])).logits
        caches[1].reorder_cache(torch.tensor([1, 0]))
        found = model(input_ids=step, **cache_kwargs(model, caches[1])).logits
        assert (found - wanted.flip(0)).norm() < 1e-5 * wanted.norm()
        heads = chosen_heads(caches[0])
        assert all(torch.equal(h, heads[n].flip(0)) for n, h in chosen_heads(caches[1]).items())
        assert not torch.equal(heads[3][0], heads[3][1])
        caches[2].batch_select_indices(torch.tensor([1]))
        one = model(input_ids=step[:1], **cache_kwargs(model, caches[2])).logits
        assert (one - wanted[1:]).norm() < 1e-5 * wanted.norm()
        other = DynamicCache(config=model.config)
        model(**zoo.ask("Llava", (3, "P", 9, 6), (4, "P", 7, 9), seed=5), **cache_kwargs(model, other))
        caches[1].layers = other.layers
        with pytest.raises(RuntimeError, match="begin with an empty cache"):
            model(input_ids=step, **cache_kwargs(model, caches[1]))


@torch.no_grad()
def test_kernels_bfloat16_and_autocast(zoo):
    model, inputs = zoo("Llava"), zoo.ask("Llava", *PROMPTS)
    real = inputs["attention_mask"].bool()
    with apply_vhr(model, ALL) as handle:
        wanted, heads = model(**inputs).logits[real], handle.heads(inputs)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(**inputs).logits[real].float()
        model.set_attn_implementation("eager")
        assert all(torch.equal(h, heads[n]) for n, h in handle.heads(inputs).items())
        half = model.bfloat16()(**{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}).logits
    assert mixed.isfinite().all()
    assert half.dtype == torch.bfloat16
    assert (half[real].float() - wanted).norm() < wanted.norm()  # a head near the median may change sides


@torch.no_grad()
def test_copies_pickles_threads_and_other_methods(zoo):
    model, inputs = zoo("Llava"), zoo.ask("Llava", *PROMPTS)
    handle = apply_vhr(model, ALL)
    again = pickle.loads(pickle.dumps(model))  # before the hooks that transformers puts in with the first pass
    wanted, twin = model(**inputs).logits, copy.deepcopy(model)
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
    with pytest.raises(ValueError, match="order"):
        apply_var(model, VARConfig(dims=(7,), tau=6.0))
    handle.remove()
    plain = model(**inputs).logits
    assert not torch.equal(plain, wanted)
    assert torch.equal(twin(**inputs).logits, wanted)
    assert torch.equal(again(**inputs).logits, wanted)
    with apply_vhr(model, ALL, order=1), apply_var(model, VARConfig(dims=tuple(range(20)), tau=2.2), order=2):
        both = model(**inputs).logits
    assert not torch.equal(both, wanted)
    assert torch.equal(model(**inputs).logits, plain)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.model.language_model.modules())


@torch.no_grad()
def test_outputs_of_heads_are_those_of_the_own_thread(zoo):
    model, inputs, other = zoo("Llava"), zoo.ask("Llava", *PROMPTS), zoo.ask("Llava", (3, "P", 4), seed=3)
    wanted, passes = head_outputs(model, inputs), []

    def meanwhile(module, args, output):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=torch.no_grad()(lambda: passes.append(model(**other))))
            thread.start()
            thread.join()

    hook = model.register_forward_hook(meanwhile)
    found = head_outputs(model, inputs)
    hook.remove()
    assert len(passes) == 1
    assert all(torch.equal(found[layer], out) for layer, out in wanted.items())


@torch.no_grad()
def test_trace(zoo, family):
    """T-VHD of every word of an answer, against single passes over what came before it."""
    model, pieces = zoo(family), (1, 5, "P", 6, 7, 8)
    inputs = zoo.ask(family, pieces)
    answer = torch.tensor([[11, 12, 13]])
    if family == "PaliGemma":
        with pytest.raises(NotImplementedError, match="sees itself whole"):
            trace_tvhd(model, inputs, answer)
        return
    found = trace_tvhd(model, inputs, answer, 2)
    wanted = []
    for n in range(3):
        words = tuple(answer[0, :n].tolist())
        here = head_outputs(model, zoo.ask(family, (*pieces, *words)))
        there = head_outputs(model, bare(zoo, family, (*pieces, *words)))
        wanted.append(token_vhd([vision_aware_divergence(here[i], there[i]) for i in range(4)], 2))
    torch.testing.assert_close(found[0], torch.cat(wanted), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="no prompt has a picture"):
        trace_tvhd(model, zoo.ask(family, (1, 5)), answer)


def test_bad_models_and_layers(zoo):
    with pytest.raises(ValueError, match=r"0\.\.3"):
        apply_vhr(zoo("Llava"), VHRConfig(layers=(4,)))
    with pytest.raises(NotImplementedError, match="Linear"):
        apply_vhr(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="layers"):
        head_outputs(zoo("Llava"), {}, [9])


@torch.no_grad()
def test_heads_are_compared_under_other_rules(zoo):
    """Calibration holds in the pass without pictures as well, in any order of the two."""
    model, inputs = zoo("Llava"), zoo.ask("Llava", *PROMPTS)
    act = ACTConfig(layers=(0, 1, 2), threshold=("absolute", 0.05), beta=0.0)
    with apply_act(model, act, order=2.0):
        wanted = by_hooks(zoo, "Llava", model, PROMPTS)[0]
        with apply_vhr(model, ALL, order=1.0):
            found = chosen_heads(model(**inputs, use_cache=True).past_key_values, order=1.0)
    assert all(torch.equal(found[layer], wanted[layer]) for layer in range(4))
    plain = by_hooks(zoo, "Llava", model, PROMPTS)[0]
    assert any(not torch.equal(wanted[layer], plain[layer]) for layer in range(4))
