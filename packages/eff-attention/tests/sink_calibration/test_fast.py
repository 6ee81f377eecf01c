"""The fast path on single calls whose queries have next to nothing but sinks."""

import pytest
import torch
from eff_attention.sink_calibration import ACTConfig, apply_act, calibrate_attention, fast
from eff_attention.sink_calibration.measure import look
from eff_kernels.edit.attention import AttentionCall, attend_explicit, dense
from eff_kernels.edit.caches import cache_kwargs, returned_cache

HEADS = (0, 3)


def call_of(dtype, heavy):
    """A causal call of 64 queries; those in ``heavy`` give nearly all, or all of their weight to key 5."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 64, 8, generator=random) for h in (4, 2, 2))
    for n, row in enumerate(heavy):
        q[:, :, row] = (4 + 40 * (n % 2)) * k[:, :, 5].repeat_interleave(2, 1)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    return AttentionCall(torch.nn.Identity(), "attention", 0, q, k, v, scale=8**-0.5, causal=True)


def both(call):
    sinks = torch.zeros(2, 2, 64, dtype=torch.bool)
    sinks[:, :, 5] = True
    sinks[1, 0, 9] = True  # one head has two
    lse = look(call, HEADS, torch.ones(2, 64, dtype=torch.bool)).lse
    base = dense(call).out
    found = fast.calibrated(call, base, lse, sinks, HEADS, 0.4)
    wanted = attend_explicit(call, edit_weights=lambda w, part: calibrate_attention(w, sinks, 0.4), heads=HEADS).out
    return base, found, wanted


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_heavy_queries_get_their_whole_row(dtype, bound):
    base, found, wanted = both(call_of(dtype, (40, 41, 50, 63)))
    error = (found[:, list(HEADS)] - wanted).float().norm(dim=-1)
    assert (error <= bound * wanted.float().norm(dim=-1)).all()
    assert torch.equal(found[:, [1, 2]], base[:, [1, 2]])


@torch.no_grad()
def test_many_heavy_queries_are_left_to_the_explicit_path():
    assert both(call_of(torch.float32, range(20, 64)))[1] is None


@torch.no_grad()
@pytest.mark.parametrize("heads", [HEADS, (0, 1, 2, 3)])
@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (300, 300), (40, 200), (1, 90)])
def test_plain_calls_are_looked_at_as_all_others(heads, queries, keys):
    """Sums, counts and log-sum-exps of calls without a mask are those of the same call with its mask written out."""
    random = torch.Generator().manual_seed(1)
    q = 3 * torch.randn(2, 4, queries, 8, generator=random)
    k, v = (torch.randn(2, 2, keys, 8, generator=random) for _ in "kv")
    offset = keys - queries
    causal = queries > 1
    call = AttentionCall(
        torch.nn.Identity(), "attention", 0, q, k, v, scale=8**-0.5, causal=causal, offset=offset if causal else 0
    )
    place = torch.arange(keys)
    mask = (place <= (torch.arange(queries) + offset)[:, None])[None, None]
    real = torch.ones(2, queries, dtype=torch.bool)
    found, wanted = look(call, heads, real), look(call.replace(mask=mask, causal=False), heads, real)
    torch.testing.assert_close(found.sums, wanted.sums, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.rows, wanted.rows)
    torch.testing.assert_close(found.lse, wanted.lse)


@torch.no_grad()
@pytest.mark.parametrize("heads", ["all", {0: (1,), 1: (0, 3)}])
def test_single_queries_are_answered_in_one_step(model, ids, heads):
    prompt, after = ids[:1], torch.tensor([7, 9, 11, 13])
    logits = []
    for path in ("explicit", "auto"):
        config = ACTConfig(layers=":", heads=heads, threshold=("absolute", 0.05), beta=0.1, path=path)
        with apply_act(model, config) as handle:
            out = model(prompt, use_cache=True)
            rows = []
            for token in after:
                out = model(token.view(1, 1), **cache_kwargs(model, returned_cache(out)), use_cache=True)
                rows.append(out.logits[0, -1])
            assert sum(head.sinks for head in handle.stats()) > 0
        logits.append(torch.stack(rows))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
