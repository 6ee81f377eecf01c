import itertools

import eff_attention.neighborhood as neighborhood
import pytest
import torch
from eff_attention import neighborhood_attention
from eff_attention.neighborhood import na_av, na_qk, natten2dav, natten2dqkrpb


@pytest.mark.parametrize("layout", ["heads_last", "heads_first"])
@pytest.mark.parametrize("causal", [False, True])
def test_halves_are_the_fused_operation(layout, causal):
    q, k, v = torch.randn(3, 2, 9, 11, 2, 16)
    more_k, more_v = torch.randn(2, 2, 3, 2, 16)
    settings = ((3, 4), (1, 2), (2, 1), (causal, False))
    wanted = neighborhood_attention(q, k, v, *settings, None, more_k, more_v)
    if layout == "heads_first":
        q, k, v, more_k, more_v = (t.movedim(-2, 1) for t in (q, k, v, more_k, more_v))
    scores = na_qk(q / 4, k, *settings, additional_keys=more_k, layout=layout)
    assert scores.shape == (*q.shape[:-1], 15)
    out = na_av(scores.softmax(-1), v, *settings, additional_values=more_v, layout=layout)
    out = out.movedim(1, -2) if layout == "heads_first" else out
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["heads_last", "heads_first"])
def test_key_value_heads_serve_groups_of_queries(layout):
    q = torch.randn(2, 7, 6, 16)
    k, v = torch.randn(2, 2, 7, 2, 16)
    more_k, more_v = torch.randn(2, 2, 3, 2, 16)
    wanted = neighborhood_attention(q, k, v, 4, additional_keys=more_k, additional_values=more_v, scale=1.0)
    if layout == "heads_first":
        q, k, v, more_k, more_v = (t.movedim(-2, 1) for t in (q, k, v, more_k, more_v))
    weights = na_qk(q, k, 4, additional_keys=more_k, layout=layout).softmax(-1)
    out = na_av(weights, v, 4, additional_values=more_v, layout=layout)
    torch.testing.assert_close(out.movedim(1, -2) if layout == "heads_first" else out, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="key has 4 heads, which do not divide 6"):
        na_qk(torch.zeros(1, 7, 6, 8), torch.zeros(1, 7, 4, 8), 3)


def test_bias_is_that_of_the_relative_position():
    rpb, q = torch.randn(2, 5, 7), torch.zeros(1, 9, 8, 2, 4)
    scores = na_qk(q, q, (3, 4), dilation=(3, 1), rpb=rpb)
    index, _ = neighborhood.unfused.window_index((9, 8), (3, 4), (1, 1), (3, 1), (False, False))
    for x, y, slot in itertools.product(range(9), range(8), range(12)):
        j = int(index[slot, x * 8 + y])
        wanted = rpb[:, (j // 8 - x) // 3 + 2, j % 8 - y + 3]
        assert torch.equal(scores[0, x, y, :, slot], wanted)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_older_names_of_natten(rank):
    qkrpb, av = (getattr(neighborhood, f"natten{rank}d{n}") for n in ("qkrpb", "av"))
    q, k, v = (torch.randn(1, 2, *[7] * rank, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    rpb = torch.randn(2, *[5] * rank, dtype=torch.float64, requires_grad=True)

    def attend(q, k, v, rpb):
        return av(qkrpb(q, k, rpb, 3, 2).softmax(-1), v, 3, 2)

    assert torch.autograd.gradcheck(attend, (q, k, v, rpb), fast_mode=True)
    plain = qkrpb(q, k, None, 3, 2)
    torch.testing.assert_close(plain, na_qk(q, k, 3, 1, 2, layout="heads_first"))
    torch.testing.assert_close(qkrpb(q, k, torch.ones_like(rpb), 3, 2), plain + 1)
    with pytest.raises(ValueError, match=f"takes a query of {rank + 3} dimensions"):
        qkrpb(q[0], k[0], None, 3, 2)
    with pytest.raises(ValueError, match=f"takes a value of {rank + 3} dimensions"):
        av(plain, v[0], 3, 2)


Q = torch.zeros(1, 6, 6, 2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: na_qk(Q, Q[:, :5], 3), r"\[1, 2, 5, 6, 4\]"),
        (lambda: na_qk(Q, Q, 7), "7 .* 6, on axis 0"),
        (lambda: na_qk(Q, Q, 3, is_causal=True, rpb=torch.zeros(2, 5, 5)), "causal"),
        (lambda: na_qk(Q, Q, 3, rpb=torch.zeros(2, 5, 3)), r"\[2, 5, 5\], got \[2, 5, 3\]"),
        (lambda: na_qk(Q, Q, 3, layout="last"), "'last'"),
        (lambda: na_av(torch.zeros(1, 6, 6, 2, 8), Q, 3), "9 slots"),
    ],
)
def test_errors_name_what_they_saw(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_shims_take_the_bias_of_natten_two():
    q = torch.zeros(1, 2, 5, 5, 4)
    rpb = torch.arange(50.0).view(2, 5, 5)
    scores = natten2dqkrpb(q, q, rpb, 3, 1)
    assert torch.equal(scores[0, :, 2, 2], rpb[:, 1:4, 1:4].flatten(1))
    assert torch.equal(scores[0, :, 0, 0], rpb[:, 2:, 2:].flatten(1))
    assert natten2dav(scores.softmax(-1), q, 3, 1).shape == q.shape
