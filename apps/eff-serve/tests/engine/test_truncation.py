"""Drawing from the largest tokens alone against drawing from everything, sorted."""

import collections
import math

import pytest
import torch
from eff_serve.engine import truncation
from eff_serve.engine.sampler import Sampler, sample_batch
from eff_serve.engine.truncation import draw
from eff_serve.engine.types import Sampling
from hypothesis import given, settings
from hypothesis import strategies as st


def by_definition(logits, s, chance):
    """Token by token, in Python's own floats."""
    top = float(logits.max())
    # The division is float32, as the model's logits are: equal quotients are ties.
    scaled = ((logits - top) / torch.tensor(s.temperature, dtype=torch.float32)).tolist()
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    weights = {i: math.exp(scaled[i]) for i in order}
    if 0 < s.top_k < len(order):
        least = scaled[order[s.top_k - 1]]
        order = [i for i in order if scaled[i] >= least]
    if s.min_p > 0:
        order = [i for i in order if weights[i] >= s.min_p]
    total, before, stay = math.fsum(weights[i] for i in order), 0.0, []
    for i in order:
        if s.top_p < 1 and stay and before >= s.top_p * total:
            break
        stay.append(i)
        before += weights[i]
    target, run = chance * math.fsum(weights[i] for i in stay), 0.0
    for i in stay:
        run += weights[i]
        if run > target:
            return i
    return stay[-1]


SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 1.0, 1.7, 30.0]),
        "top_k": st.sampled_from([0, 1, 5, 40, 255, 256, 257, 600]),
        "top_p": st.sampled_from([1.0, 0.999, 0.95, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 1.0, 0.4, 0.013, 1e-4]),
    }
)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(SETTINGS, min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.0, 0.2, 3.0, 12.0]),
    coarse=st.sampled_from([None, 2.0, 0.5]),
    forbidden=st.sampled_from([0.0, 0.5, 0.999]),
)
def test_the_token_is_that_of_the_definition(rows, seed, spread, coarse, forbidden):
    """Many equal logits, flat and steep ones, and rows with few tokens allowed, in batches of mixed settings."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), 700, generator=generator) * spread
    if coarse is not None:
        logits = (logits / coarse).round() * coarse
    logits[torch.rand(logits.shape, generator=generator) < forbidden] = -torch.inf
    logits[:, 13] = torch.where(logits.isfinite().any(1), logits[:, 13], 0.0)
    chances = torch.rand(len(rows), dtype=torch.float64, generator=generator).tolist()
    wanted = [Sampling(max_tokens=1, **row) for row in rows]
    got = draw(logits, wanted, chances)
    for row, s, chance, token in zip(logits, wanted, chances, got, strict=True):
        truth = by_definition(row, s, chance)
        if token != truth:  # only where a sum lies within rounding of the border
            near = {by_definition(row, s, min(max(chance + e, 0.0), 1 - 1e-12)) for e in (-1e-6, 1e-6)}
            cut = {
                by_definition(row, Sampling(max_tokens=1, **{**rows[0], **_near(s, e)}), chance) for e in (-1e-6, 1e-6)
            }
            assert token in near | cut


def _near(s, e):
    return {
        "temperature": s.temperature, "top_k": s.top_k, "top_p": min(1.0, s.top_p + e), "min_p": s.min_p * (1 + e),
    }  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(row=SETTINGS, seed=st.integers(0, 10**6), spread=st.sampled_from([0.2, 3.0]), coarse=st.booleans())
def test_the_largest_alone_give_what_everything_gives(row, seed, spread, coarse):
    """To the bit, whether or not they decide: the same call with a head as long as the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, 700, generator=generator) * spread
    if coarse:
        logits = logits.round()
    chances = torch.rand(8, dtype=torch.float64, generator=generator).tolist()
    wanted = [Sampling(max_tokens=1, **row)] * 8
    quick = draw(logits, wanted, chances)
    before, truncation.HEAD = truncation.HEAD, 700
    try:
        assert draw(logits, wanted, chances) == quick
    finally:
        truncation.HEAD = before


@pytest.mark.parametrize("s", [{}, {"top_p": 0.9}, {"top_k": 300}, {"min_p": 0.001}])
def test_frequencies_beyond_the_largest(s):
    """A flat row: most of the mass lies outside of the head."""
    logits = torch.linspace(0.0, -0.5, 1000)[None]
    n = 3000
    chances = [(i + 0.5) / n for i in range(n)]
    counts = collections.Counter(draw(logits, [Sampling(max_tokens=1, **s)], [c])[0] for c in chances)
    p = logits[0].double().exp()
    if "top_p" in s:
        p[p.cumsum(0) - p >= 0.9 * p.sum()] = 0
    if "top_k" in s:
        p[300:] = 0
    p /= p.sum()
    for token in range(1000):
        assert abs(counts[token] - n * float(p[token])) <= 1  # an even grid of chances: one point more or less


def test_a_batch_draws_what_each_draws_alone():
    logits = torch.randn(5, 2000, generator=torch.Generator().manual_seed(1)) * 3
    settings_ = [{"top_p": 0.9}, {"temperature": 0.0}, {"top_k": 20}, {}, {"min_p": 0.2, "temperature": 2.0}]

    def samplers():
        return [Sampler(Sampling(max_tokens=1, seed=i, **s), frozenset()) for i, s in enumerate(settings_)]

    together = [sample_batch(batch, logits) for batch in [samplers()] for _ in range(3)]
    alone = samplers()
    for tokens in together:
        assert tokens == [sampler.sample(row, [], []) for sampler, row in zip(alone, logits, strict=True)]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    logits = torch.zeros(1, 300)
    logits[0, 7] = bad
    with pytest.raises(ValueError, match="not finite"):
        draw(logits, [Sampling(max_tokens=1)], [0.5])
    with pytest.raises(ValueError, match="not finite"):
        draw(torch.full((1, 300), -torch.inf), [Sampling(max_tokens=1)], [0.5])
