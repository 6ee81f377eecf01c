import asyncio
import threading
import time

import pytest
import torch
from eff_serve.engine.decoder import PAGE
from eff_serve.engine.sampler import Sampler
from eff_serve.engine.types import DrainingError, QueueFullError, Sampling
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def naive(decoder, prompt, sampling):
    """Ids and finish reason by one request at a time, without cache or engine."""
    sampler, eos, output = Sampler(sampling, decoder.config.eos_token_ids), decoder.config.eos_token_ids, []
    while len(output) < sampling.max_tokens:
        output.append(sampler.sample(decoder.logits([*prompt, *output]), prompt, output))
        if output[-1] in sampling.stop_token_ids or (output[-1] in eos and not sampling.ignore_eos):
            return output, "stop"
    return output, "length"


def tokens(steps):
    return [s.token for s in steps if s.token is not None]


REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 49), min_size=1, max_size=150),
        st.fixed_dictionaries(
            {
                "max_tokens": st.integers(1, 70),
                "temperature": st.sampled_from([0.0, 1.0]),
                "seed": st.integers(0, 5),
                "top_p": st.sampled_from([1.0, 0.8]),
                "presence_penalty": st.sampled_from([0.0, 0.7]),
                "ignore_eos": st.booleans(),
            }
        ),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=REQUESTS, num_pages=st.integers(8, 20), chunk=st.sampled_from([1, 7, 64]), max_batch=st.integers(1, 6))
def test_text_is_the_same_whatever_shares_the_cache(
    hash_decoder, make_engine, ask, requests, num_pages, chunk, max_batch
):
    decoder = hash_decoder(num_pages)
    engine = make_engine(decoder, max_model_len=8 * PAGE, chunk=chunk, max_batch=max_batch)
    for (prompt, wanted), steps in zip(requests, ask(engine, requests), strict=True):
        assert (tokens(steps), steps[-1].finish_reason) == naive(decoder, prompt, Sampling(**wanted))
        assert all(s.finish_reason is None for s in steps[:-1])
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0.0)


def test_too_little_memory_preempts_without_changing_the_text(hash_decoder, make_engine, ask):
    decoder = hash_decoder(num_pages=6)
    engine = make_engine(decoder, max_model_len=6 * PAGE, max_batch=4)
    settings_ = {"max_tokens": 4 * PAGE, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    requests = [([i, i + 1, i + 2], settings_) for i in range(4)]
    answers = ask(engine, requests)
    for (prompt, wanted), steps in zip(requests, answers, strict=True):
        assert tokens(steps) == naive(decoder, prompt, Sampling(**wanted))[0]
    prefilled = sum(count for kind, count in decoder.batches if kind == "prefill")
    assert prefilled > 4 * 3  # some were computed anew: 4 x 5 pages cannot fit into 6
    assert engine.stats().kv_usage == 0


def test_a_prompt_waits_until_there_is_room_for_it(hash_decoder, make_engine, ask):
    """Beside a sequence that runs, a prompt begins only with its pages and one more free; else it would go back."""
    decoder = hash_decoder(num_pages=5)
    engine = make_engine(decoder, max_model_len=5 * PAGE, max_batch=2, chunk=PAGE, prefix_cache=False)
    settings_ = {"max_tokens": 2 * PAGE, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    long, short = ([(i + 3 * j) % 50 for j in range(n)] for i, n in ((0, 3 * PAGE), (1, 4)))
    ask(engine, [(short, settings_), (short, settings_ | {"max_tokens": 2}), (long, settings_)])
    assert sum(count for kind, count in decoder.batches if kind == "prefill") == 2 * len(short) + len(long)


def test_decoding_goes_on_between_the_pieces_of_a_long_prompt(hash_decoder, make_engine, ask):
    decoder = hash_decoder()
    engine = make_engine(decoder, chunk=16)
    ask(engine, [([1], {"max_tokens": 40, "temperature": 0.0, "ignore_eos": True}), ([2] * 200, {"max_tokens": 1})])
    pieces = [i for i, (kind, count) in enumerate(decoder.batches) if kind == "prefill" and count > 1]
    assert len(pieces) == -(-200 // 16)
    between = decoder.batches[pieces[1] : pieces[-1]]
    assert ("decode", 1) in between


def test_stop_tokens_min_tokens_and_length(hash_decoder, make_engine, ask):
    decoder = hash_decoder()
    engine = make_engine(decoder)
    free = tokens(ask(engine, [([5], {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True})])[0])
    stop = free[4]
    first = free.index(stop)
    stopped = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, "stop_token_ids": frozenset({stop})}
    (steps,) = ask(engine, [([5], stopped)])
    assert tokens(steps) == free[: first + 1]
    assert steps[-1].finish_reason == "stop"
    (later,) = ask(engine, [([5], {**stopped, "min_tokens": 10})])
    assert stop not in tokens(later)[:10]
    assert len(tokens(later)) >= 10


def test_scores_are_those_of_log_softmax(hash_decoder, make_engine, ask):
    decoder = hash_decoder()
    engine = make_engine(decoder, chunk=8)
    prompt = list(range(20))
    (steps,) = ask(
        engine, [(prompt, {"max_tokens": 4, "seed": 1, "logprobs": 3, "prompt_logprobs": 2, "ignore_eos": True})]
    )
    assert steps[0].token is None
    for i, scored in enumerate(steps[0].prompt_scores, 1):
        truth = torch.log_softmax(decoder.logits(prompt[:i]).double(), -1)
        assert scored.token == prompt[i]
        assert scored.logprob == pytest.approx(float(truth[prompt[i]]), abs=1e-5)
        assert [t for t, _ in scored.top] == truth.topk(2).indices.tolist()
    assert len(steps[0].prompt_scores) == 19
    for i, step in enumerate(steps[1:]):
        truth = torch.log_softmax(decoder.logits(prompt + tokens(steps)[:i]).double(), -1)
        assert step.score.logprob == pytest.approx(float(truth[step.token]), abs=1e-5)
        assert [p for _, p in step.score.top] == pytest.approx(truth.topk(3).values.tolist(), abs=1e-5)


def test_max_tokens_0_only_scores(hash_decoder, make_engine, ask):
    steps, plain = ask(
        make_engine(hash_decoder()), [([1, 2, 3], {"max_tokens": 0, "prompt_logprobs": 0}), ([1], {"max_tokens": 0})]
    )
    assert tokens(steps) == tokens(plain) == []
    assert [len(s.prompt_scores) for s in steps if s.prompt_scores is not None] == [2]
    assert steps[-1].finish_reason == plain[-1].finish_reason == "length"


def test_an_error_ends_the_request_that_it_was_for_and_the_engine_goes_on(hash_decoder, make_engine, ask):
    decoder = hash_decoder()
    engine = make_engine(decoder)
    decoder.fail_on = 7
    wanted = {"max_tokens": 1, "temperature": 0.0}
    bad, good = ask(engine, [([7], wanted), ([8], wanted)])
    assert bad[-1].finish_reason == "error"
    assert "RuntimeError: the fake decoder was told to fail" in bad[-1].error
    assert len(tokens(good)) == 1
    decoder.fail_on = None
    assert ask(engine, [([7], wanted)])[0][-1].finish_reason in ("length", "stop")
    assert engine.stats().kv_usage == 0


def test_logits_that_are_not_finite_end_the_request_that_they_are_of(hash_decoder, make_engine, ask):
    decoder = hash_decoder()
    own = decoder.logits
    decoder.logits = lambda tokens: own(tokens) * (torch.nan if tokens[0] == 7 and len(tokens) > 3 else 1)
    wanted = {"max_tokens": 12, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    bad, good = ask(make_engine(decoder), [([7], wanted), ([8], wanted)])
    assert ("decode", 2) in decoder.batches
    assert bad[-1].finish_reason == "error"
    assert "not finite" in bad[-1].error
    assert (tokens(good), good[-1].finish_reason) == naive(decoder, [8], Sampling(**wanted))


def test_cancel_frees_running_and_waiting_requests(hash_decoder, make_engine):
    engine = make_engine(hash_decoder(), max_batch=1)

    async def run():
        wanted = Sampling(max_tokens=500, ignore_eos=True, seed=0)
        running, waiting = engine.submit([1], wanted), engine.submit([2], wanted)
        steps = aiter(running)
        await anext(steps)
        assert engine.stats().running == 1
        for stream in (running, waiting):
            stream.cancel()
            stream.cancel()
        last = [s async for s in steps][-1]
        assert [s async for s in waiting][-1].finish_reason == last.finish_reason == "cancelled"
        waiting.cancel()

    asyncio.run(asyncio.wait_for(run(), 60))
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0.0)


def test_a_reader_whose_loop_is_gone_loses_its_slot(hash_decoder, make_engine):
    engine = make_engine(hash_decoder())

    async def leave():
        engine.submit([1], Sampling(max_tokens=511, ignore_eos=True))

    asyncio.run(leave())
    deadline = time.monotonic() + 30
    while engine.stats().running + engine.stats().waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert engine.stats().kv_usage == 0


def test_the_line_is_bounded_by_requests_and_by_tokens(hash_decoder, tokenizer_file, make_engine):
    gate = threading.Event()
    decoder = hash_decoder()
    prefill = decoder.prefill

    def slow(*args, **kwargs):
        gate.wait(30)
        return prefill(*args, **kwargs)

    decoder.prefill = slow
    engine = make_engine(decoder, max_batch=1, max_waiting=2, max_waiting_tokens=100)

    async def run():
        wanted = Sampling(max_tokens=1)
        streams = [engine.submit([1], wanted)]
        while engine.stats().running == 0:
            await asyncio.sleep(0.01)
        streams.append(engine.submit([1] * 60, wanted))
        with pytest.raises(QueueFullError) as too_many_tokens:
            engine.submit([1] * 60, wanted)
        streams.append(engine.submit([1] * 30, wanted))
        with pytest.raises(QueueFullError) as too_many_requests:
            engine.submit([1], wanted)
        assert too_many_tokens.value.retry_after > 0
        assert too_many_requests.value.retry_after > 0
        gate.set()
        for stream in streams:
            assert [s async for s in stream][-1].finish_reason in ("length", "stop")

    asyncio.run(asyncio.wait_for(run(), 60))


def test_stop_lets_running_requests_end_and_takes_no_more(hash_decoder, make_engine):
    engine = make_engine(hash_decoder())

    async def run():
        stream = engine.submit([1], Sampling(max_tokens=30, ignore_eos=True))
        steps = aiter(stream)
        await anext(steps)
        stopping = asyncio.create_task(asyncio.to_thread(engine.stop, 30.0))
        while True:
            try:
                engine.submit([1], Sampling(max_tokens=1)).cancel()
            except DrainingError:
                break
            await asyncio.sleep(0.001)
        assert [s async for s in steps][-1].finish_reason == "length"
        await stopping

    asyncio.run(asyncio.wait_for(run(), 60))


def test_stop_without_grace_cancels(hash_decoder, make_engine):
    engine = make_engine(hash_decoder())

    async def run():
        steps = aiter(engine.submit([1], Sampling(max_tokens=500, ignore_eos=True)))
        await anext(steps)
        await asyncio.to_thread(engine.stop, 0.0)
        assert [s async for s in steps][-1].finish_reason == "cancelled"

    asyncio.run(asyncio.wait_for(run(), 60))
    assert engine.stats().kv_usage == 0


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 1, "at least one token"),
        ([50], 1, "from 0 to 49"),
        ([-1], 1, "from 0 to 49"),
        ([1] * 500, 13, "500 .* 13 .* 512"),
    ],
)
def test_impossible_requests_are_refused(hash_decoder, make_engine, ask, prompt, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        ask(make_engine(hash_decoder()), [(prompt, {"max_tokens": max_tokens})])


def test_a_model_length_beyond_the_cache_is_refused(hash_decoder, tokenizer_file, make_engine):
    with pytest.raises(ValueError, match="needs 16 pages, the cache has 2"):
        make_engine(hash_decoder(num_pages=2))
