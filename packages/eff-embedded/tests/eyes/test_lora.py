"""LoRA behind pictures: where it acts, what it leaves bit for bit, and that no call leaves anything on the model."""

import copy
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from eff_embedded.eyes.lora import ARGUMENT, watch_pictures


def same(a, b):
    return torch.equal(a, b)


@torch.inference_mode()
def logits(model, inputs, **more):
    return model(**inputs, **more).logits


def test_text_alone_is_the_base_model_bit_for_bit(base, eyes, prompts):
    text = prompts("text")
    assert same(logits(base, text), logits(eyes, text))
    answers = [m.generate(input_ids=text["input_ids"], max_new_tokens=12, do_sample=False) for m in (base, eyes)]
    assert same(*answers)


def test_lora_acts_from_the_first_picture_on(base, eyes, prompts):
    for kind in ("picture", "two"):
        plain, changed = logits(base, prompts(kind)), logits(eyes, prompts(kind))
        assert same(plain[:, :3], changed[:, :3])
        assert (plain[:, 3:] - changed[:, 3:]).abs().amax((0, 2)).min() > 1e-3


def test_the_same_with_lora_everywhere_behind(eyes, prompts):
    inputs = prompts("picture")
    behind = (torch.arange(inputs["input_ids"].shape[1]) >= 3)[None]
    assert same(logits(eyes, inputs), logits(eyes, inputs, **{ARGUMENT: behind}))
    merged = copy.deepcopy(eyes)
    for module in merged.modules():
        if hasattr(module, "lora_a"):
            module.weight.data += module.lora_b.data @ module.lora_a.data
            module.lora_b.data.zero_()
    hidden = [m.get_input_embeddings()(torch.tensor([[9, 8, 7]])) for m in (eyes, merged)]
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    a = logits(eyes, {"inputs_embeds": hidden[0]}, **{ARGUMENT: everywhere})
    torch.testing.assert_close(a, logits(merged, {"inputs_embeds": hidden[1]}), atol=1e-4, rtol=1e-4)


def test_decoding_with_a_cache_equals_one_pass(eyes, prompts):
    inputs = prompts("picture")
    out = eyes.generate(**inputs, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    whole = logits(eyes, {**inputs, "input_ids": out.sequences})
    steps = torch.stack(out.logits, 1)
    torch.testing.assert_close(steps, whole[:, -9:-1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_of_either_name_remembers_pictures(name):
    """transformers 5.24 calls the cache "cache", as an argument and in what a model gives."""
    seen = []

    class Model(torch.nn.Module):
        config = SimpleNamespace(image_token_id=16)

        def forward(self, input_ids, pixel_values=None, **more):
            seen.append(more.get(ARGUMENT))
            return SimpleNamespace(**{name: more.get(name) or SimpleNamespace()})

    watch_pictures(model := Model())
    for first, wanted in (({"pixel_values": torch.zeros(1)}, [[False, True, True]]), ({}, None)):
        out = model(torch.tensor([[1, 16, 2]]), **first)
        model(torch.tensor([[3]]), **{name: getattr(out, name)})
        before, after = (s if s is None else s.tolist() for s in seen[-2:])
        assert before == wanted
        assert after == (wanted and [[True]])


def test_a_batch_of_text_and_pictures_is_answered_as_if_alone(eyes, prompts):
    requests = [prompts("picture", 1), prompts("text"), prompts("two", 2)]
    width = max(r["input_ids"].shape[1] for r in requests)
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for row, request in enumerate(requests):
        ids[row, -request["input_ids"].shape[1] :] = request["input_ids"]
        mask[row, -request["input_ids"].shape[1] :] = 1
    pixels = torch.cat([r["pixel_values"] for r in requests if r["pixel_values"] is not None])
    for options in ({}, {"num_beams": 3}):
        settings = {"max_new_tokens": 10, "do_sample": False, **options}
        out = eyes.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, **settings)[:, width:]
        for row, request in zip(out, requests, strict=True):
            given = {k: v for k, v in request.items() if v is not None}
            alone = eyes.generate(**given, attention_mask=torch.ones_like(request["input_ids"]), **settings)
            assert same(alone[0, request["input_ids"].shape[1] :], row)


def test_embeddings_instead_of_ids(eyes, prompts):
    inputs = prompts("picture")
    embedded = eyes.get_input_embeddings()(inputs["input_ids"])
    by_embeddings = logits(eyes, {"inputs_embeds": embedded, "pixel_values": inputs["pixel_values"]})
    assert same(logits(eyes, inputs), by_embeddings)


def test_copies_pickles_and_bf16(base, eyes, prompts):
    inputs = prompts("picture")
    packed = pickle.dumps(eyes)  # before the first call, after which transformers' own hooks hold local functions
    expected = logits(eyes, inputs)
    assert same(expected, logits(copy.deepcopy(eyes), inputs))
    assert same(expected, logits(pickle.loads(packed), inputs))
    half = copy.deepcopy(eyes).bfloat16()
    narrow = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
    text = prompts("text")
    assert same(logits(half, text), logits(copy.deepcopy(base).bfloat16(), text))
    wrong = (logits(half, narrow).float() - expected).norm() / expected.norm()
    assert wrong < 0.1


def test_two_threads_never_meet(eyes, prompts):
    jobs = {kind: prompts(kind) for kind in ("text", "picture")}
    expected = {kind: logits(eyes, inputs) for kind, inputs in jobs.items()}
    wrong = []

    def run(kind):
        wrong.extend(kind for _ in range(40) if not same(expected[kind], logits(eyes, jobs[kind])))

    threads = [threading.Thread(target=run, args=(kind,)) for kind in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_error_leaves_nothing_behind(base, eyes, prompts):
    inputs = prompts("picture")

    def fail(*_):
        raise RuntimeError("told to fail")

    hook = eyes.model.language_model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="told to fail"):
        logits(eyes, inputs)
    hook.remove()
    text = prompts("text")
    assert same(logits(base, text), logits(eyes, text))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_checkpointing(eyes, prompts, reentrant):
    inputs = prompts("picture")

    def gradients(model):
        model.train()
        model(**inputs, use_cache=False).logits.square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if ".lora_" in n or "projector" in n}

    plain, saved = gradients(copy.deepcopy(eyes)), copy.deepcopy(eyes)
    enable = getattr(saved, "activation_checkpointing_enable", None) or saved.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    again = gradients(saved)
    assert plain.keys() == again.keys()
    assert len(plain) == 3 * 5 * 2 + 4
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


def test_refusals(eyes, prompts):
    with pytest.raises(ValueError, match="wanted one value for each token"):
        logits(eyes, prompts("text"), **{ARGUMENT: torch.ones(1, 2, dtype=torch.bool)})
    with torch.inference_mode():
        cache = eyes(**prompts("picture"), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="cache holds 1 sequences, the call has 2"):
            eyes(input_ids=torch.tensor([[1], [2]]), past_key_values=cache)
