"""Rows, columns, masses and entropies against brute force: padding, caches, chunks, windows, half precision."""

import math

import pytest
import torch
from eff_kernels.edit.attention import (
    AttentionCall,
    attend_explicit,
    column_sums,
    columns,
    entropy,
    explicit,
    log_sum_exp,
    masses,
    observe_attention,
    rows,
)
from eff_kernels.edit.caches import cache_kwargs


def random_call(seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, n, 8, generator=generator) * 2 for h, n in ((6, 7), (2, 11), (2, 11)))
    fields = {"module": torch.nn.Identity(), "name": "attn", "layer": 0, "q": q, "k": k, "v": v, "scale": 0.4}
    return AttentionCall(**{**fields, **more})


def brute(call):
    """Weights and logits in float64, one entry after the other; hidden entries are -inf."""
    batch, heads, queries, keys = (*call.q.shape[:3], call.num_keys)
    logits = torch.full((batch, heads, queries, keys), -torch.inf, dtype=torch.float64)
    sinks = None if call.sinks is None else call.sinks.double()
    weights = torch.zeros_like(logits)
    keep = call.mask.expand(batch, heads, queries, keys) if call.mask is not None else None
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                for j in range(keys):
                    x = call.scale * call.q[b, h, i].double() @ call.k[b, h * call.num_kv_heads // heads, j].double()
                    x = call.softcap * math.tanh(x / call.softcap) if call.softcap else x
                    x = x + call.bias[0, h, i, j].double() if call.bias is not None else x
                    hidden = call.causal and j > i + call.offset
                    if call.window is not None and keep is None:
                        hidden = hidden or j <= i + call.offset - call.window
                    if keep is not None:
                        hidden = hidden or not keep[b, h, i, j] if keep.dtype == torch.bool else hidden
                        x = x + keep[b, h, i, j].double() if keep.dtype != torch.bool else x
                    if not hidden:
                        logits[b, h, i, j] = x
                bottom = logits[b, h, i].exp().sum() + (0 if sinks is None else sinks[h].exp())
                if bottom > 0:
                    weights[b, h, i] = logits[b, h, i].exp() / bottom
    return weights, logits


GENERATOR = torch.Generator().manual_seed(3)
VARIANTS = {
    "plain": {},
    "causal": {"causal": True},
    "flash causal": {"causal": True, "offset": 4},
    "window": {"causal": True, "offset": 4, "window": 3},
    "bool": {"mask": torch.rand(2, 1, 7, 11, generator=GENERATOR) > 0.4},
    "additive": {"mask": torch.randn(2, 1, 7, 11, generator=GENERATOR)},
    "softcap": {"softcap": 2.0, "causal": True},
    "sinks": {"sinks": torch.randn(6, generator=GENERATOR), "causal": True},
    "bias": {"bias": torch.randn(1, 6, 7, 11, generator=GENERATOR), "scale": 1.0},
    "blind": {"mask": torch.arange(7)[:, None].expand(1, 1, 7, 11) > 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("block", [2**24, 60])
def test_against_brute_force(variant, block, monkeypatch):
    monkeypatch.setattr(explicit, "_BLOCK", block)
    call = random_call(**VARIANTS[variant])
    weights, logits = brute(call)
    value = call.v.repeat_interleave(3, 1).double()
    sinks = -torch.inf if call.sinks is None else call.sinks.double()[:, None, None]
    lse = torch.cat([logits, (torch.zeros(6, 1, 1) + sinks).expand(2, 6, 7, 1)], -1).logsumexp(-1)
    only = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    groups = torch.rand(2, 3, 11, generator=torch.Generator().manual_seed(1)) > 0.5
    heads = [4, 1]
    pick = [1, 4]
    close = {"rtol": 1e-5, "atol": 3e-6, "check_dtype": False}
    check = torch.testing.assert_close
    out = attend_explicit(call, weights=True, lse=True)
    check(out.out, weights @ value, **close)
    check(out.weights, weights, **close)
    check(out.lse, lse, **close)
    check(log_sum_exp(call), lse, **close)
    check(rows(call, [-1, 2]), weights[:, :, [6, 2]], **close)
    check(rows(call, slice(5, None), heads), weights[:, pick, 5:], **close)
    check(columns(call, [0, -3]), weights[..., [0, 8]], **close)
    check(columns(call, torch.tensor([3]), heads), weights[:, pick][..., [3]], **close)
    check(masses(call, groups), weights @ groups.double().mT[:, None], **close)
    check(masses(call, groups[0], heads, slice(2, 5)), weights[:, pick, 2:5] @ groups[0].double().mT, **close)
    check(column_sums(call), weights.sum(2), **close)
    check(
        column_sums(call, torch.tensor([0, 1, 0, 0, 1, 0]).bool(), slice(1, 4)), weights[:, pick, 1:4].sum(2), **close
    )
    check(entropy(call), torch.special.entr(only).sum(-1), atol=1e-5, rtol=1e-5, check_dtype=False)
    assert not any(t.isnan().any() for t in (out.out, out.weights, entropy(call)))


def test_what_is_asked_must_exist():
    call = random_call()
    for wrong in (lambda: rows(call, [7]), lambda: columns(call, [-12]), lambda: rows(call, [0], heads=[6])):
        with pytest.raises(ValueError, match=r"7 query|11 key|heads must be in 0\.\.5"):
            wrong()
    with pytest.raises(ValueError, match=r"\[n, 11\]"):
        masses(call, torch.ones(2, 7))
    with pytest.raises(ValueError, match="mask of heads"):
        rows(call, [0], heads=torch.ones(2, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_mass(dtype):
    call = random_call(causal=True)
    call = call.replace(q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype))
    exact = random_call(causal=True).replace(**{n: getattr(call, n).double() for n in "qkv"})
    assert attend_explicit(call).out.dtype == dtype
    torch.testing.assert_close(rows(call, slice(None)).sum(-1), torch.ones(2, 6, 7), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows(call, slice(None)), brute(exact)[0].float(), atol=1e-6, rtol=1e-5)
    assert rows(exact, [0]).dtype == torch.float64


def test_gradients_where_nothing_is_seen():
    mask = torch.arange(7)[:, None].expand(1, 1, 7, 11) > 1
    call = random_call(mask=mask)
    call = call.replace(**{n: getattr(call, n).double().requires_grad_() for n in "qkv"})
    (entropy(call).sum() + attend_explicit(call).out.sum() + column_sums(call)[..., 0].sum()).backward()
    assert all(getattr(call, n).grad.isfinite().all() for n in "qkv")
    assert not call.q.grad[:, :, :2].any()


def _prefix_mask(length, pads):
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, :pads] = 0
    return mask


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "gemma2"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("chunks", [(9, 1, 1), (4, 5, 1, 1)], ids=str)
@torch.no_grad()
def test_rows_through_caches(name, cache, chunks, zoo):
    """Each token's attention, read in pieces through a cache with left padding, is that of one long forward."""
    from transformers import DynamicCache, StaticCache

    model, _ = zoo(name)
    ids = zoo.ids(11)
    mask = _prefix_mask(11, 3)
    seen = []

    def look(call, output):
        assert (output.out - attend_explicit(call).out)[:, :, -1].abs().max() < 2e-5
        weights = rows(call, slice(None))
        torch.testing.assert_close(weights.sum(-1)[0], masses(call, torch.ones(1, call.num_keys))[0, ..., 0])
        seen.append((call.layer, weights, entropy(call)))

    with observe_attention(model, look):
        model(ids, attention_mask=mask, use_cache=False)
        whole = {layer: (w, e) for layer, w, e in seen}
        seen.clear()
        if cache == "none":
            return
        made = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=11)
        start = 0
        for size in chunks:
            stop = start + size
            model(ids[:, start:stop], attention_mask=mask[:, :stop], **cache_kwargs(model, made))
            for layer, weights, spread in seen:
                want = whole[layer][0][:, :, start:stop, :stop]
                got = weights[..., weights.any(2).any(1).any(0)]  # places that hold a key that somebody sees
                used = want[..., want.any(2).any(1).any(0)]
                real = mask[:, start:stop].bool()
                for row in range(2):
                    torch.testing.assert_close(got[row][:, real[row]], used[row][:, real[row]], atol=2e-5, rtol=1e-4)
                    torch.testing.assert_close(
                        spread[row][:, real[row]],
                        whole[layer][1][row, :, start:stop][:, real[row]],
                        atol=1e-4,
                        rtol=1e-4,
                    )
            seen.clear()
            start = stop
