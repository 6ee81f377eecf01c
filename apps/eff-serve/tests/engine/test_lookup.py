"""Guessing ahead: answers are those without guesses, and fewer passes give them."""

import pytest
from eff_serve.engine.decoder import PAGE, Decoder
from eff_serve.engine.lookup import Guesser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def tokens(steps):
    return [s.token for s in steps if s.token is not None]


def test_what_followed_the_last_three_tokens_is_guessed():
    text = [1, 2, 3, 4, 5, 6, 9, 1, 2, 3]
    guesser = Guesser(text)
    assert guesser.guess(4) == [4, 5, 6, 9]
    assert guesser.guess(1) == []  # one token is not worth it
    text += [7, 8, 1, 2, 3]
    assert guesser.guess(3) == [7, 8, 1]  # the latest place
    assert Guesser([5, 7, 7, 7, 7]).guess(4) == [7, 7, 7, 7]  # and goes on as it repeats itself
    assert Guesser([1, 2, 3]).guess(4) == []
    assert Guesser([]).guess(4) == []


def test_wrong_guesses_are_followed_by_steps_without():
    guesser = Guesser([1, 2, 3, 4, 5, 1, 2, 3])
    waits = []
    for _ in range(4):
        assert guesser.guess(4)
        guesser.came_true(0)
        waits.append(0)
        while not guesser.guess(4):
            waits[-1] += 1
    assert waits == [1, 3, 7, 15]
    guesser.came_true(2)
    assert guesser.guess(4)


class Repeating:
    """A decoder whose text repeats its prompt, and whose passes are counted."""

    def __new__(cls, hash_decoder, period, **settings):
        decoder = hash_decoder(**settings)
        plain = decoder.logits

        def logits(history):
            found = plain(history) * 0.2
            if len(history) >= period:
                found[history[-period]] += 3.0 if len(history) % 11 else -3.0
            return found

        decoder.logits = logits
        return decoder


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.lists(st.integers(4, 49), min_size=1, max_size=60),
    period=st.integers(3, 12),
    options=st.fixed_dictionaries(
        {
            "max_tokens": st.integers(1, 60),
            "temperature": st.sampled_from([0.0, 0.5]),
            "seed": st.just(3),
            "presence_penalty": st.sampled_from([0.0, 0.4]),
            "ignore_eos": st.booleans(),
            "logprobs": st.sampled_from([None, 2]),
        }
    ),
    lookup=st.integers(1, 9),
)
def test_the_answer_is_that_without_guesses(hash_decoder, make_engine, ask, prompt, period, options, lookup):
    answers = []
    for most in (0, lookup):
        engine = make_engine(Repeating(hash_decoder, period, num_pages=8), max_model_len=8 * PAGE, lookup=most)
        (steps,) = ask(engine, [(prompt, options)])
        answers.append([(s.token, s.score, s.finish_reason) for s in steps])
    assert answers[0] == answers[1]


def test_fewer_passes(hash_decoder, make_engine, ask):
    wanted = {"max_tokens": 60, "temperature": 0.0, "ignore_eos": True}
    passes = {}
    for lookup in (0, 8):
        decoder = Repeating(hash_decoder, 6)
        engine = make_engine(decoder, lookup=lookup)
        (steps,) = ask(engine, [([9, 8, 7, 6, 5, 4], wanted)])
        passes[lookup] = len(decoder.batches), tokens(steps)
    assert passes[0][1] == passes[8][1]
    assert passes[8][0] < 0.6 * passes[0][0]


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_the_real_decoder_answers_alike(tiny_model, make_engine, ask, quantize):
    folder = tiny_model("llama")
    prompt = [5, 6, 7, 8, 9, 10, 11] * 5
    # A leaning towards two tokens makes the text of a random model repeat itself.
    leaning = {7: 30.0, 9: 29.0}
    wanted = {"max_tokens": 40, "temperature": 0.0, "ignore_eos": True, "logprobs": 1, "logit_bias": leaning}
    answers, guessed = {}, []
    for lookup in (0, 6):
        decoder = Decoder(folder, quantize=quantize, num_pages=8)
        prefill = decoder.prefill

        def counted(*args, run=prefill, **options):
            guessed.append(bool(options.get("all_logits")))
            return run(*args, **options)

        decoder.prefill = counted
        (steps,) = ask(make_engine(decoder, lookup=lookup), [(prompt, wanted)])
        answers[lookup] = [(s.token, s.score) for s in steps]
    assert answers[0] == answers[6]
    assert any(guessed)


def test_others_in_the_batch_and_refusals(hash_decoder, make_engine, ask):
    decoder = Repeating(hash_decoder, 6)
    engine = make_engine(decoder, lookup=8)
    wanted = {"max_tokens": 30, "temperature": 0.0, "ignore_eos": True}
    prompts = [[9, 8, 7, 6, 5, 4], [10, 11, 12, 13, 14, 15]]
    together = [tokens(s) for s in ask(engine, [(p, wanted) for p in prompts])]
    assert together == [tokens(ask(engine, [(p, wanted)])[0]) for p in prompts]
    decoder.reuse = object()
    with pytest.raises(ValueError, match="lookup=8 is for models on eff's own decoder, without layer reuse"):
        make_engine(decoder, lookup=8)
