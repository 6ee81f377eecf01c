import itertools

import numpy as np
import pytest
import torch
from eff_attention.layer_reuse import (
    ReuseProfile,
    best_smallest,
    best_sources,
    fewest_resets,
    ratio90,
    search_policy,
)
from eff_attention.layer_reuse.blocks import block_mass, heaviest
from eff_attention.layer_reuse.search import merge_heads
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS = ((0.9, 0.8, 0.5, 0.4, 0.3), (0.85, 0.6, 0.5, 0.4), (0.7, 0.65, 0.5), (0.95, 0.7), (0.75,))
WORKED = np.eye(6)
for i, row in enumerate(ROWS):
    WORKED[i, i + 1 :] = row


def digits(text):
    return tuple(int(c) for c in text)


@pytest.mark.parametrize(
    ("budget", "source", "smallest"),
    [(0, "000000", 0.3), (1, "000333", 0.7), (2, "000335", 0.8), (3, "002335", 0.9), (4, "012335", 0.95)],
)
def test_largest_smallest_overlap_of_the_worked_example(budget, source, smallest):
    found = best_smallest(WORKED, budget).source
    assert found == digits(source)
    assert min(WORKED[i, j] for j, i in enumerate(found)) == smallest


@pytest.mark.parametrize(("theta", "source"), [(0.7, "000333"), (0.8, "000335"), (0.9, "002335"), (0.96, "012345")])
def test_fewest_resets_of_the_worked_example(theta, source):
    assert fewest_resets(WORKED, theta).source == digits(source)


def test_any_layer_that_chose_may_be_a_source():
    overlap = np.eye(4)
    overlap[0, 1:], overlap[1, 2:], overlap[2, 3] = (0.9, 0.2, 0.8), (0.3, 0.4), 0.6
    assert best_sources(overlap, 0.5).source == (0, 0, 2, 0)  # past layer 2, which chose last
    assert best_sources(overlap, 0.85).source == (0, 0, 2, 3)
    assert best_sources(overlap, 0.5, {3}).source == (0, 0, 2, 3)
    policy = search_policy(profile(overlap), "any_source", theta=0.5, force_full=())
    assert policy.summary() == "1 full, 1 anchor, 2 reuse: A 0 F 0"


def test_full_layers_break_or_bridge_a_run():
    assert fewest_resets(WORKED, 0.7, {2}, bridge=False).source == digits("002333")
    assert fewest_resets(WORKED, 0.5, {2}, bridge=False).source == digits("002333")
    assert fewest_resets(WORKED, 0.5, {2}, bridge=True).source == digits("002222")


def test_without_bridges_a_full_layer_is_never_crossed():
    overlap = np.triu(np.full((4, 4), 0.8), 1) + np.eye(4)
    with pytest.raises(ValueError, match=r"2 layers that stay full, and those after them .*: use bridge_full=True"):
        search_policy(
            profile(overlap), "max_min", sparsity=1.0, compute_ratio=0.0, force_full=(0, 2), bridge_full=False
        )
    found = search_policy(
        profile(overlap), "max_min", sparsity=1.0, compute_ratio=0.5, force_full=(0, 2), bridge_full=False
    )
    assert found.summary() == "4 full, 0 anchor, 0 reuse: F F F F"
    assert best_sources(WORKED, 0.3, {2}, bridge=False).source == digits("002333")
    assert best_sources(WORKED, 0.3, {2}).source == digits("002222")


def test_no_plan_crosses_a_full_layer_or_there_is_none():
    generator = np.random.default_rng(1)
    plans_found = 0
    for _ in range(200):
        overlap = np.triu(generator.random((6, 6)).round(1), 1) + np.eye(6)
        full = {int(i) for i in generator.choice(6, 2, replace=False)}
        budget = int(generator.integers(0, 6))
        legal = [
            source for source, count in plans(6)
            if count <= budget and all(j == i or not full & set(range(i, j + 1)) for j, i in enumerate(source))
        ]  # fmt: skip
        if not legal:
            with pytest.raises(ValueError, match="stay full"):
                best_smallest(overlap, budget, full, bridge=False)
            continue
        plans_found += 1
        found = best_smallest(overlap, budget, full, bridge=False).source
        assert found in legal
        assert gain(overlap, found) == pytest.approx(max(gain(overlap, s) for s in legal))
    assert 50 < plans_found < 150


def test_layers_that_stay_full_must_exist():
    with pytest.raises(ValueError, match=r"force_full names the layers \[9, -7\] of a model with 6 layers"):
        search_policy(profile(WORKED), theta=0.0, force_full=(0, 9, -7))


def plans(layers):
    for resets in itertools.product((False, True), repeat=layers - 1):
        source = [0]
        for j, reset in enumerate(resets, 1):
            source.append(j if reset else source[-1])
        yield tuple(source), sum(resets)


def gain(overlap, source):
    gains = [1.0 if i == j else overlap[i, j] for j, i in enumerate(source)]
    return min(gains), sum(gains)


def test_both_programmes_find_what_trying_everything_finds():
    generator = np.random.default_rng(0)
    for case in range(300):
        overlap = np.triu(generator.random((7, 7)).round(1 if case % 2 else 6), 1) + np.eye(7)
        budget, theta = int(generator.integers(0, 7)), float(generator.random())
        best = max(gain(overlap, s) for s, count in plans(7) if count <= budget)
        assert gain(overlap, best_smallest(overlap, budget).source) == pytest.approx(best)
        allowed = [
            (-count, sum(overlap[i, j] for j, i in enumerate(s) if i != j))
            for s, count in plans(7)
            if all(i == j or overlap[i, j] >= theta for j, i in enumerate(s))
        ]
        found = fewest_resets(overlap, theta).source
        resets = sum(i == j for j, i in enumerate(found)) - 1
        total = sum(overlap[i, j] for j, i in enumerate(found) if i != j)
        assert (-resets, total) == pytest.approx(max(allowed))


def test_a_budget_below_the_full_layers_is_named():
    with pytest.raises(ValueError, match="1 resets does not cover the 2 layers"):
        best_smallest(WORKED, 1, {3, 4})


def profile(overlap, ratio=None):
    layers = len(overlap)
    ratio = np.full((3, layers, 2), 0.5, np.float32) if ratio is None else ratio
    nothing = np.full(layers, np.nan, np.float32)
    return ReuseProfile(
        np.stack([overlap] * 2).astype(np.float32), ratio, nothing, nothing, {"top_k": 64, "block_size": 16}
    )


def test_a_policy_comes_from_the_search():
    policy = search_policy(profile(WORKED), theta=0.7, force_full=())
    assert policy.summary() == "0 full, 2 anchor, 4 reuse: A 0 0 A 3 3"
    assert policy.score == pytest.approx(0.7)
    assert (
        search_policy(profile(WORKED), theta=0.7, force_full=(0,)).summary() == "1 full, 1 anchor, 4 reuse: F 0 0 A 3 3"
    )
    assert policy.meta["top_k"] == 64


def test_the_most_diffuse_layers_stay_full():
    ratio = np.full((3, 6, 2), 0.2, np.float32)
    ratio[:, 4] = 0.9
    policy = search_policy(profile(WORKED, ratio), "max_min", sparsity=0.85, compute_ratio=0.3, force_full=())
    assert policy.kind[4] == "full"
    assert 2 <= sum(s == -1 for s in policy.source) <= 4
    with pytest.raises(ValueError, match="use 'min_full', 'max_min' or 'any_source'"):
        search_policy(profile(WORKED), "best")
    with pytest.raises(ValueError, match=r"theta=1.5"):
        search_policy(profile(WORKED), theta=1.5)
    with pytest.raises(ValueError, match="compute_ratio=2"):
        search_policy(profile(WORKED), "max_min", compute_ratio=2)


def test_heads_merge_by_minimum_mean_or_quantile():
    stack = np.stack([WORKED, WORKED * 0.5])
    assert (merge_heads(stack, "min") == WORKED * 0.5).all()
    assert merge_heads(stack, "mean") == pytest.approx(WORKED * 0.75)
    assert merge_heads(stack, 0.5) == pytest.approx(WORKED * 0.75)
    with pytest.raises(ValueError, match="'max'"):
        merge_heads(stack, "max")


def test_a_profile_travels_and_merges(tmp_path):
    one, two = profile(WORKED), profile(WORKED * 0.5, np.full((1, 6, 2), 0.1, np.float32))
    one.save(tmp_path / "profile")
    found = ReuseProfile.load(tmp_path / "profile")
    for name in ("overlap", "ratio90", "rnmse", "kl"):
        assert getattr(found, name).dtype == np.float32
        np.testing.assert_array_equal(getattr(found, name), getattr(one, name))
    assert found.meta == one.meta
    merged = ReuseProfile.merge([one, two])
    assert merged.overlap[0] == pytest.approx(WORKED * (3 + 0.5) / 4)
    assert len(merged.ratio90) == 4
    np.savez(tmp_path / "q.npz", overlap=one.overlap)
    with pytest.raises(ValueError, match="is not a ReuseProfile file"):
        ReuseProfile.load(tmp_path / "q.npz")
    with pytest.raises(ValueError, match="one shape"):
        ReuseProfile.merge([one, profile(WORKED[:3, :3])])


@pytest.mark.parametrize(
    ("mass", "wanted"),
    [
        ((0.125,) * 8, 0.875),
        ((0.0, 1.0, 0.0, 0.0), 0.0),
        ((0.5, 0.3, 0.15, 0.05), 0.5),
    ],
)
def test_ratio90_counts_blocks_that_stay_below(mass, wanted):
    assert ratio90(torch.tensor(mass)).item() == wanted


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(2, 14), st.integers(0, 2**31))
def test_the_heaviest_blocks_and_the_forced_ones(blocks, count, seed):
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(3, 2, blocks, generator=generator)
    ends = torch.randint(1, blocks + 1, (3,), generator=generator)
    found = heaviest(mass, count, ends, (0, -1))
    for t in range(3):
        inside = range(int(ends[t]))
        for g in range(2):
            order = sorted(inside, key=lambda i: (i not in (0, inside[-1]), -mass[t, g, i].item()))
            assert found[t, g].nonzero().flatten().tolist() == sorted(order[:count])


def test_mass_is_summed_over_blocks():
    assert block_mass(torch.tensor([0.5, 0.0, 0.3, 0.0, 0.1, 0.05, 0.05]), 2).tolist() == pytest.approx(
        [0.5, 0.3, 0.15, 0.05]
    )
