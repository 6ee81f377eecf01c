"""The formulas on maps: worked numbers, and what must hold for any map."""

import pytest
import torch
from eff_attention.sink_calibration import ACTConfig, calibrate_attention, find_attention_sinks
from hypothesis import given, settings
from hypothesis import strategies as st

MAP = torch.tensor([[1, 0, 0, 0], [0.7, 0.3, 0, 0], [0.5, 0.1, 0.4, 0], [0.4, 0.2, 0.35, 0.05]])


def causal(seed, *shape, dtype=torch.float32):
    """Random maps [..., n, n] with uneven rows."""
    scores = 2 * torch.randn(*shape, shape[-1], generator=torch.Generator().manual_seed(seed))
    hidden = torch.ones(shape[-1], shape[-1], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).to(dtype)


@pytest.mark.parametrize(
    ("tau", "treated", "rows"),
    [
        (0.3, [2], [[0.7, 0.3, 0, 0], [0.7, 0.14, 0.16, 0], [0.529231, 0.264615, 0.14, 0.066154]]),
        (0.1, [1, 2], [[0.88, 0.12, 0, 0], [0.8, 0.04, 0.16, 0], [0.693333, 0.08, 0.14, 0.086667]]),
    ],
)
def test_worked_example(tau, treated, rows):
    sinks = find_attention_sinks(MAP, ("absolute", tau))
    assert sinks.nonzero()[:, 0].tolist() == treated
    found = calibrate_attention(MAP, sinks, 0.4)
    assert torch.equal(found[0], MAP[0])
    torch.testing.assert_close(found[1:], torch.tensor(rows), atol=1e-6, rtol=0)


def test_column_means_bound_the_sinks():
    means = [0.65, 0.2, 0.375, 0.05]
    for j in (1, 2, 3):
        for tau, wanted in ((means[j] - 1e-3, True), (means[j] + 1e-3, False)):
            assert bool(find_attention_sinks(MAP, ("absolute", tau))[j]) is wanted


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.sampled_from([0.0, 0.4, 0.9]))
def test_what_holds_for_any_map(seed, n, beta):
    attn = causal(seed, 2, 3, n).double()
    sinks = find_attention_sinks(attn)
    new = calibrate_attention(attn, sinks, beta)
    at = sinks[..., None, :].expand_as(attn)
    assert not sinks[..., 0].any()
    # The map is one of float32: its rows sum to 1 within that.
    torch.testing.assert_close(new.sum(-1), torch.ones_like(new.sum(-1)), atol=2e-6, rtol=0)
    assert (new >= 0).all()
    assert (new[attn == 0] == 0).all()
    assert torch.equal(new[..., 0, :], attn[..., 0, :])
    assert torch.equal(new[at], beta * attn[at])
    others = ~at & (attn > 0)
    ratio = torch.where(others, new / attn, torch.nan)
    spread = torch.where(others, ratio, -torch.inf).amax(-1) - torch.where(others, ratio, torch.inf).amin(-1)
    assert spread.max() < 1e-12


def test_brute_force_of_sinks_with_padding():
    attn, n = causal(3, 3, 2, 9), 9
    mask = torch.ones(3, n, dtype=torch.long)
    mask[1, :4], mask[2, 6:] = 0, 0
    for spare in ("first_token", "first_sink"):
        found = find_attention_sinks(attn, ("absolute", 0.15), attention_mask=mask, spare=spare, min_rows=2)
        for b in range(3):
            real = mask[b].nonzero()[:, 0].tolist()
            for h in range(2):
                high = []
                for j in real:
                    rows = [i for i in real if i >= j]
                    if len(rows) >= 2 and sum(attn[b, h, i, j].item() for i in rows) / len(rows) > 0.15:
                        high.append(j)
                wanted = [j for j in high if j != real[0]] if spare == "first_token" else high[1:]
                assert found[b, h].nonzero()[:, 0].tolist() == wanted


def test_relative_and_absolute_agree_at_fifty_tokens():
    attn = causal(0, 4, 50) ** 3
    attn = attn / attn.sum(-1, keepdim=True)
    found = find_attention_sinks(attn, ("relative", 5.0))
    assert found.any()
    assert torch.equal(found, find_attention_sinks(attn, ("absolute", 0.1)))
    padded = torch.nn.functional.pad(attn[:, None], (6, 0, 6, 0))
    mask = torch.tensor([[0] * 6 + [1] * 50]).expand(4, -1)
    assert torch.equal(find_attention_sinks(padded, ("relative", 5.0), attention_mask=mask)[:, 0, 6:], found)


def test_last_token_counts_as_the_published_code_has_it_unless_more_rows_are_asked_for():
    attn = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0.2, 0, 0.8]])
    assert find_attention_sinks(attn).tolist() == [False, False, True]
    assert not find_attention_sinks(attn, min_rows=2).any()


def test_first_sink_is_spared_as_the_published_code_has_it():
    attn = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0.5, 0.5]]).double()
    attn[0, 0] = 0.0  # the first token is no sink: the published code then spares the next
    assert find_attention_sinks(attn).tolist() == [False, True, True]
    assert find_attention_sinks(attn, spare="first_sink").tolist() == [False, False, True]


def test_rows_of_nothing_but_sinks_stay_and_have_gradients():
    attn = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0.5, 0.5]], requires_grad=True)
    new = calibrate_attention(attn, torch.tensor([False, True, True]), 0.4)
    assert torch.equal(new, attn)
    new.square().sum().backward()
    assert attn.grad.isfinite().all()


def test_learnt_sinks_leave_rows_below_one():
    attn = 0.8 * MAP
    new = calibrate_attention(attn, find_attention_sinks(attn, ("absolute", 0.2)), 0.4)
    torch.testing.assert_close(new.sum(-1), attn.sum(-1))


def test_gradient():
    attn = causal(1, 2, 5).double().requires_grad_()
    sinks = find_attention_sinks(attn)
    assert sinks.any()
    assert torch.autograd.gradcheck(lambda a: calibrate_attention(a, sinks, 0.3), attn)


def test_only_listed_heads_change():
    attn = causal(5, 2, 4, 8)
    sinks = find_attention_sinks(attn)
    assert sinks[:, 2].any()
    new = calibrate_attention(attn, sinks, 0.4, heads=[2])
    rest = [0, 1, 3]
    assert torch.equal(new[:, rest], attn[:, rest])
    assert torch.equal(new[:, 2], calibrate_attention(attn, sinks, 0.4)[:, 2])
    assert torch.equal(calibrate_attention(attn, sinks, 0.4, heads=[]), attn)
    half = attn.bfloat16()
    assert calibrate_attention(half, sinks, 0.4).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"beta": 1.2}, "beta=1.2"), ({"beta": -0.1}, "beta=-0.1"), ({"beta": float("nan")}, "beta=nan"),
        ({"threshold": ("absolute", 0.0)}, "positive"), ({"threshold": ("share", 0.1)}, "share"),
        ({"layers": "two"}, "layers='two'"), ({"min_rows": 0}, "min_rows=0"), ({"decode": "on"}, "decode='on'"),
    ],
)  # fmt: skip
def test_settings_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        ACTConfig(**change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": "2:-1"}, "leaves none"), ({"layers": (7,)}, r"0\.\.2"), ({"heads": {1: (4,)}}, r"0\.\.3"),
        ({"heads": {3: (0,)}}, r"0\.\.2"), ({"heads": {0: (0,)}}, "sliding"), ({"layers": (0,)}, "sliding"),
    ],
)  # fmt: skip
def test_layers_and_heads_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        ACTConfig(**change).chosen(3, 4, {0: "sliding_attention"})


def test_settings_travel():
    config = ACTConfig(heads={2: (1, 0), 1: (3,)}, threshold=("relative", 5.0), layers=(1, 2))
    assert ACTConfig.from_dict(config.to_dict()) == config
    assert config.chosen(3, 4, {}) == {1: (3,), 2: (0, 1)}
    assert ACTConfig().chosen(6, 1, {3: "sliding_attention"}) == {2: (0,), 4: (0,)}


def test_maps_are_refused():
    with pytest.raises(ValueError, match="q <= n"):
        find_attention_sinks(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="attention_mask"):
        find_attention_sinks(torch.zeros(2, 3, 3), attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="bool"):
        calibrate_attention(MAP, torch.zeros(4))
    with pytest.raises(ValueError, match="sinks must be"):
        calibrate_attention(MAP, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="heads must be"):
        calibrate_attention(MAP[None], torch.zeros(4, dtype=torch.bool), heads=[1])
    with pytest.raises(ValueError, match="beta=2"):
        calibrate_attention(MAP, torch.zeros(4, dtype=torch.bool), 2)


def test_others_with_next_to_no_weight_take_none():
    """A share by a number below the range of float32 would be infinite, and not a number where it meets a 0."""
    weights = torch.tensor([[[0.0, 1.0, 1e-44, 0.0]]])
    sinks = torch.tensor([[False, True, False, False]])
    assert torch.equal(calibrate_attention(weights, sinks, 0.4), weights)
