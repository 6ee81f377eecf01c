import collections
import math

import pytest
import torch
from eff_serve.engine.sampler import Sampler, adjusted, score
from eff_serve.engine.truncation import kept
from eff_serve.engine.types import Sampling
from hypothesis import given
from hypothesis import strategies as st

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0, 0.0])
FLOATS = st.floats(-8, 8, width=32)
# Far enough apart that their probabilities differ in float32: the order of equal ones is nobody's promise.
DISTINCT = st.lists(st.integers(-8000, 8000), min_size=1, max_size=12, unique=True).map(lambda v: [i / 1000 for i in v])


@given(
    logits=st.lists(FLOATS, min_size=6, max_size=6),
    prompt=st.lists(st.integers(0, 5), max_size=6),
    output=st.lists(st.integers(0, 5), max_size=6),
    repetition=st.sampled_from([1.0, 1.3, 0.8]),
    presence=st.sampled_from([0.0, 0.5, -1.0]),
    frequency=st.sampled_from([0.0, 0.25]),
    bias=st.dictionaries(st.integers(0, 5), st.floats(-100, 100, width=32), max_size=3),
)
def test_penalties_and_bias_token_by_token(logits, prompt, output, repetition, presence, frequency, bias):
    s = Sampling(
        max_tokens=1,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
    )
    before = torch.tensor(logits)
    got = adjusted(before, s, prompt, output)
    assert before.tolist() == logits
    counts = collections.Counter(output)
    for token, logit in enumerate(logits):
        value = logit
        if token in prompt or token in output:
            value = value / repetition if value > 0 else value * repetition
        if token in counts:
            value -= presence + frequency * counts[token]
        value += bias.get(token, 0.0)
        assert float(got[token]) == pytest.approx(value, rel=1e-5, abs=1e-5)


@given(
    logits=DISTINCT,
    top_k=st.integers(0, 12),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_truncation_keeps_what_its_definition_keeps(logits, top_k, top_p, min_p):
    settings_ = Sampling(max_tokens=1, top_k=top_k, top_p=top_p, min_p=min_p)
    scaled = torch.tensor(logits).sort(descending=True).values
    scaled -= scaled[0].clone()
    total = float(scaled.double().exp().sum())
    count = kept(scaled.numpy(), settings_, total, len(logits))
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    allowed = order[:top_k] if top_k else order
    weights = {i: math.exp(logits[i] - logits[order[0]]) for i in allowed}
    allowed = [i for i in allowed if weights[i] >= min_p * (1 + 1e-5)]
    close = [i for i in weights if abs(weights[i] - min_p) <= 1e-5]  # either way is right
    total, before, wanted = sum(weights[i] for i in weights if weights[i] >= min_p), 0.0, []
    for i in allowed:
        if before > top_p * total * (1 + 1e-4) and wanted:
            break
        wanted.append(i)
        before += weights[i]
    stay = set(order[:count])
    assert count >= 1
    if not close:
        assert stay <= set(wanted) | {order[0]}
        sure, before = [], 0.0
        for i in allowed:
            if before >= top_p * total * (1 - 1e-4):
                break
            sure.append(i)
            before += weights[i]
        assert set(sure) <= stay


def test_frequencies_follow_the_probabilities():
    sampler = Sampler(Sampling(max_tokens=1, seed=3, temperature=0.7), frozenset())
    n = 4000
    counts = collections.Counter(sampler.sample(LOGITS, [], []) for _ in range(n))
    for token, p in enumerate(torch.softmax(LOGITS.double() / 0.7, -1).tolist()):
        # five standard deviations of a binomial count
        assert abs(counts[token] - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1


def test_the_seed_decides():
    def draw(seed):
        sampler = Sampler(Sampling(max_tokens=1, seed=seed), frozenset())
        return [sampler.sample(LOGITS, [], []) for _ in range(30)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_greedy_min_tokens_and_grammar_masks():
    greedy = {"max_tokens": 9, "temperature": 0.0}
    assert Sampler(Sampling(**greedy), frozenset({0})).sample(LOGITS, [], []) == 0
    held_back = Sampler(Sampling(**greedy, min_tokens=1, stop_token_ids=frozenset({1})), frozenset({0}))
    assert held_back.sample(LOGITS, [], []) == 2
    assert held_back.sample(LOGITS, [], [4]) == 0
    only_last = torch.tensor([False] * 5 + [True])
    assert Sampler(Sampling(**greedy), frozenset()).sample(LOGITS, [], [], only_last) == 5
    for seed in range(20):
        assert Sampler(Sampling(max_tokens=9, seed=seed), frozenset()).sample(LOGITS, [], [], only_last) == 5


def test_score_is_log_softmax():
    truth = torch.log_softmax(LOGITS.double(), -1)
    got = score(LOGITS, 3, 2)
    assert got.token == 3
    assert got.logprob == pytest.approx(float(truth[3]), abs=1e-6)
    assert [t for t, _ in got.top] == [0, 1]
    assert [p for _, p in got.top] == pytest.approx(truth[:2].tolist(), abs=1e-6)
    assert score(LOGITS, 3, 0).top == ()


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-38, 1e-20, 1e-6])
def test_tiny_temperatures_are_greedy(temperature):
    sampler = Sampler(Sampling(max_tokens=1, temperature=temperature, top_p=0.9, seed=1), frozenset())
    assert {sampler.sample(LOGITS * 1000, [], []) for _ in range(5)} == {0}
