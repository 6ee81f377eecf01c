"""Requests that share keys: the same answers as without, counted, and never written into what others read."""

from types import SimpleNamespace

import pytest
import torch
from eff_serve.engine.decoder import PAGE, Decoder
from eff_serve.engine.sampler import Sampler
from eff_serve.engine.types import Sampling
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def naive(decoder, prompt, sampling):
    sampler, output = Sampler(sampling, decoder.config.eos_token_ids), []
    while len(output) < sampling.max_tokens:
        output.append(sampler.sample(decoder.logits([*prompt, *output]), prompt, output))
        if output[-1] in decoder.config.eos_token_ids and not sampling.ignore_eos:
            break
    return output


def tokens(steps):
    return [s.token for s in steps if s.token is not None]


def guard(engine, decoder):
    """Let the fake decoder fail on a write to a page that others read or may find."""

    def check(page):
        if engine.scheduler.blocks.pool.holders(page) != 1 or page in engine.scheduler.blocks.cache._entries:
            raise RuntimeError(f"page {page} is shared")

    decoder.on_write = check


STEMS = [[i] * 70 for i in range(3)]
TURNS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(1, 70),
        st.lists(st.integers(0, 49), min_size=1, max_size=40),
        st.integers(1, 40),
        st.sampled_from([0.0, 1.0]),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    waves=st.lists(TURNS, min_size=1, max_size=3),
    num_pages=st.integers(8, 24),
    chunk=st.sampled_from([1, 7, 64]),
    max_batch=st.integers(1, 4),
)
def test_answers_are_those_without_sharing(hash_decoder, make_engine, ask, waves, num_pages, chunk, max_batch):
    decoder = hash_decoder(num_pages)
    engine = make_engine(decoder, max_model_len=8 * PAGE, chunk=chunk, max_batch=max_batch)
    guard(engine, decoder)
    for wave in waves:
        requests = [
            (STEMS[stem][:cut] + end, {"max_tokens": count, "temperature": temperature, "seed": 1})
            for stem, cut, end, count, temperature in wave
        ]
        for (prompt, wanted), steps in zip(requests, ask(engine, requests), strict=True):
            assert tokens(steps) == naive(decoder, prompt, Sampling(**wanted)), steps[-1]
            assert steps[-1].finish_reason in ("stop", "length")
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0.0)


def test_the_next_turn_computes_only_what_is_new(hash_decoder, make_engine, ask):
    decoder = hash_decoder()
    engine = make_engine(decoder)
    greedy = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True}
    prompt = [i % 50 for i in range(200)]
    (first,) = ask(engine, [(prompt, greedy)])
    assert first[-1].cached_tokens == 0
    decoder.batches.clear()
    turn = [*prompt, *tokens(first), 4, 5, 6]
    (second,) = ask(engine, [(turn, greedy)])
    # The last answered token was never read; it and the three new ones are.
    assert second[0].cached_tokens == second[-1].cached_tokens == len(prompt) + 19
    assert sum(count for kind, count in decoder.batches if kind == "prefill") == 4
    assert engine.stats().kv_kept > 0


def test_requests_that_arrive_together_share(hash_decoder, make_engine, ask):
    decoder = hash_decoder()
    engine = make_engine(decoder, max_batch=4)
    guard(engine, decoder)
    prompt = [i % 50 for i in range(3 * PAGE + 5)]
    wanted = {"max_tokens": 30, "temperature": 1.0, "ignore_eos": True}
    answers = ask(engine, [(prompt, {**wanted, "seed": seed}) for seed in range(4)])
    # The first is still running when the others begin: its full pages are shared, the begun one is its own.
    assert [steps[0].cached_tokens for steps in answers] == [0, *[3 * PAGE] * 3]
    for seed, steps in enumerate(answers):
        assert tokens(steps) == naive(decoder, prompt, Sampling(seed=seed, **wanted))


def test_it_can_be_switched_off_and_scores_of_a_prompt_are_computed(hash_decoder, make_engine, ask):
    prompt = list(range(40)) * 2
    off = make_engine(hash_decoder(), prefix_cache=False)
    for _ in range(2):
        (steps,) = ask(off, [(prompt, {"max_tokens": 3, "temperature": 0.0})])
        assert steps[-1].cached_tokens == 0
    assert off.stats().kv_kept == 0
    on = make_engine(hash_decoder())
    for _ in range(2):
        (steps,) = ask(on, [(prompt, {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0})])
        assert len(steps[0].prompt_scores) == len(prompt) - 1
        assert steps[-1].cached_tokens == 0
    (steps,) = ask(on, [(prompt, {"max_tokens": 1, "temperature": 0.0})])
    assert steps[-1].cached_tokens == len(prompt) - 1


def test_generated_tokens_are_not_shared_with_layer_reuse(hash_decoder, make_engine, ask):
    """Their keys come from attention to a part of the text, those of a prompt do not."""
    decoder = hash_decoder()
    decoder.reuse = SimpleNamespace(count=lambda lengths: 0)
    engine = make_engine(decoder)
    greedy = {"max_tokens": 80, "temperature": 0.0, "ignore_eos": True}
    prompt = [i % 50 for i in range(70)]
    (first,) = ask(engine, [(prompt, greedy)])
    (second,) = ask(engine, [([*prompt, *tokens(first)], {**greedy, "max_tokens": 2})])
    assert second[-1].cached_tokens == 70


def test_a_sequence_that_is_sent_back_finds_its_keys_again(hash_decoder, make_engine, ask):
    decoder = hash_decoder(num_pages=9)
    engine = make_engine(decoder, max_model_len=8 * PAGE, max_batch=2)
    guard(engine, decoder)
    wanted = {"max_tokens": 4 * PAGE, "temperature": 0.0, "ignore_eos": True}
    prompts = [[i] * 2 * PAGE for i in (1, 2)]
    for prompt, steps in zip(prompts, ask(engine, [(p, wanted) for p in prompts]), strict=True):
        assert tokens(steps) == naive(decoder, prompt, Sampling(**wanted))
        assert steps[-1].cached_tokens == 0  # what was said when it was first read
    prefilled = sum(count for kind, count in decoder.batches if kind == "prefill")
    assert 4 * PAGE < prefilled < 8 * PAGE  # anew, but not all of it


@pytest.mark.parametrize("length", [8, 9, 16, 17])
def test_a_prompt_whose_last_piece_is_one_token_is_scored(hash_decoder, make_engine, ask, length):
    engine = make_engine(hash_decoder(), chunk=8)
    (steps,) = ask(engine, [(list(range(length)), {"max_tokens": 2, "temperature": 0.0, "prompt_logprobs": 0})])
    assert len(steps[0].prompt_scores) == length - 1


@pytest.mark.parametrize("quantize", [None, "int8", "nvfp4", "fp8"])
def test_the_real_decoder_answers_alike(tiny_model, make_engine, ask, quantize):
    """To the bit: keys are the same whether a token was read in a prompt or generated, and whatever came with it."""
    folder = tiny_model("llama")
    wanted = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, "logprobs": 3}
    answers = {}
    for share in (True, False):
        decoder = Decoder(folder, quantize=quantize, num_pages=48)
        engine = make_engine(decoder, prefix_cache=share, chunk=32 if share else 19)
        text = [int(t) for t in torch.randint(3, 131, (75,), generator=torch.Generator().manual_seed(5))]
        turns = []
        for _ in range(3):
            (steps,) = ask(engine, [(text, wanted)])
            turns.append(steps)
            text = [*text, *tokens(steps), 9, 8, 7]
        answers[share] = turns
    assert [turn[-1].cached_tokens for turn in answers[False]] == [0, 0, 0]
    assert [turn[-1].cached_tokens for turn in answers[True]] == [0, 86, 101]
    for shared, alone in zip(answers[True], answers[False], strict=True):
        assert [(s.token, s.score) for s in shared] == [(s.token, s.score) for s in alone]


def test_copied_keys_are_those_of_the_page(tiny_model):
    decoder = Decoder(tiny_model("qwen3"), num_pages=4)
    ids = torch.arange(3, 3 + 20)
    decoder.prefill(ids, 0, torch.tensor([2]))
    decoder.copy_page(2, 3, 12)
    for cache in (*decoder.keys, *decoder.values):
        assert torch.equal(cache[3, :, :12], cache[2, :, :12])
        assert not cache[3, :, 12:].any()
    again = decoder.prefill(ids[12:], 12, torch.tensor([3]))
    alone = decoder.prefill(ids[12:], 12, torch.tensor([2]))
    assert torch.equal(again, alone)
