"""Statistics of attention against plain formulas, over several libraries' attention."""

import copy
import inspect
import threading

import pytest
import torch
from eff_quant.quantvla import collect_attention_stats
from eff_quant.quantvla.moments import LogitMoments
from torch import nn

HEADS, DIM, WIDTH = 4, 8, 32


def run(model, batch):
    return model["attn"](batch)


def plain_logits(attention, x, query="q", key="k"):
    q, k = (getattr(attention, n)(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for n in (query, key))
    return (q @ k.mT).double() / DIM**0.5


@torch.no_grad()
def two_pass(attention, batches, out, **names):
    """Mean over samples of the standard deviation of each head, mean over calls of the RMS."""
    std = [plain_logits(attention, x, **names).flatten(2).std(-1, correction=0) for x in batches]
    rms = [attention(x).double().square().mean().sqrt() for x in batches]
    return torch.cat(std).mean(0), torch.stack(rms).mean()


def test_the_streaming_mean_is_that_of_two_passes(plain, tokens):
    model = plain()
    stats = collect_attention_stats(model, tokens, ["attn"], run=run).modules["attn"]
    std, rms = two_pass(model["attn"], tokens, "out")
    torch.testing.assert_close(torch.tensor(stats.std).double(), std, rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.rms, rms.item(), rtol=1e-5, atol=0)
    assert stats.calls == 3


def test_other_threads_are_not_looked_at(plain, tokens):
    def both(model, batch):
        other = threading.Thread(target=torch.no_grad()(lambda: run(model, 3 * batch)))
        other.start()
        other.join()
        return run(model, batch)

    model = plain()
    assert collect_attention_stats(model, tokens, ["attn"], run=both) == collect_attention_stats(
        model, tokens, ["attn"], run=run
    )


def test_diffusers_attention(diffusers_attention, tokens):
    from diffusers.models.attention_processor import AttnProcessor

    model = diffusers_attention()
    stats = collect_attention_stats(model, tokens, ["attn"], run=run).modules["attn"]
    std, rms = two_pass(model["attn"], tokens, "out", query="to_q", key="to_k")
    torch.testing.assert_close(torch.tensor(stats.std).double(), std, rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.rms, rms.item(), rtol=1e-5, atol=0)
    model["attn"].set_processor(AttnProcessor())
    with pytest.raises(RuntimeError, match=r"attn .*did not call scaled_dot_product_attention"):
        collect_attention_stats(model, tokens, ["attn"], run=run)


def test_a_softmax_by_hand_is_refused(plain, tokens):
    model = plain(fused=False)
    with pytest.raises(RuntimeError, match=r"attn .*did not call scaled_dot_product_attention"):
        collect_attention_stats(model, tokens, ["attn"], run=run)
    run(model, tokens[0])


def test_masked_pairs_do_not_count(plain, tokens):
    model, x = plain(), tokens[0]
    mask = torch.rand(2, 1, 11, 11, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[..., 0] = True

    def masked(model, batch):
        return model["attn"](batch, mask=mask)

    stats = collect_attention_stats(model, [x], ["attn"], run=masked).modules["attn"]
    logits = plain_logits(model["attn"], x)
    wanted = [torch.stack([logits[b, h][mask[b, 0]].std(correction=0) for b in range(2)]).mean() for h in range(HEADS)]
    torch.testing.assert_close(torch.tensor(stats.std).double(), torch.stack(wanted), rtol=1e-5, atol=0)


def test_spread_by_row_ignores_what_rows_have_in_common(plain, tokens):
    model, x = plain(), tokens[0]
    stats = collect_attention_stats(model, [x], ["attn"], run=run, std="row").modules["attn"]
    logits = plain_logits(model["attn"], x)
    wanted = logits.var(-1, correction=0).mean(-1).sqrt().mean(0)
    torch.testing.assert_close(torch.tensor(stats.std).double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("spread", ["global", "row"])
def test_blocks_of_queries_change_nothing(spread):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 33, 33, generator=generator) + 3
    keep = torch.rand(2, 1, 33, 33, generator=generator) < 0.7
    whole, parts = LogitMoments(spread), LogitMoments(spread)
    whole.add(logits, keep)
    for rows in torch.arange(33).split(8):
        parts.add(logits[:, :, rows], keep[:, :, rows])
    torch.testing.assert_close(parts.std()[0], whole.std()[0], rtol=1e-9, atol=0)
    if spread == "global":
        wanted = [[logits[b, h][keep[b, 0]].double().std(correction=0) for h in range(4)] for b in range(2)]
        torch.testing.assert_close(whole.std()[0], torch.tensor(wanted).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_transformers_attention_after_rope_with_grouped_heads(llama, ids, implementation, padded):
    model = llama(attn_implementation=implementation)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    targets = ["re:.*self_attn"]
    stats = collect_attention_stats(model, [batch], targets)
    assert list(stats.modules) == [f"model.layers.{i}.self_attn" for i in range(2)]
    # eager attention hands its probabilities out: log p + a constant of the row are the logits
    reference = llama(attn_implementation="eager")
    seen = {}

    def keep(module, args, kwargs, out):
        seen[module.layer_idx] = out

    for layer in reference.model.layers:
        layer.self_attn.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        reference(**batch)
    allowed = torch.ones(12, 12, dtype=torch.bool).tril()[None] & mask[:, None, :].bool() & mask[:, :, None].bool()
    row_stats = collect_attention_stats(model, [batch], targets, std="row")
    for i, name in enumerate(stats.modules):
        output, probabilities = seen[i]
        logits = probabilities.double().log()
        wanted = torch.zeros(2, 4).double()
        for b in range(2):
            for h in range(4):
                rows = [logits[b, h, q][allowed[b, q]] for q in range(12) if allowed[b, q].any()]
                wanted[b, h] = torch.stack([r.var(correction=0) for r in rows]).mean().sqrt()
        torch.testing.assert_close(
            torch.tensor(row_stats.modules[name].std).double(), wanted.mean(0), rtol=1e-4, atol=1e-6
        )
        rms = output[mask.bool()].double().square().mean().sqrt()
        torch.testing.assert_close(stats.modules[name].rms, rms.item(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_one_query_on_a_cache_sees_all_of_it(llama, ids, implementation):
    """Grouped heads of a lone query are folded into the place of queries by transformers."""
    model = llama(attn_implementation=implementation)

    def step(model, ids):
        from transformers import DynamicCache

        # the name of the argument from transformers 5.24 on, and before
        name = next(n for n in ("cache", "past_key_values") if n in inspect.signature(model.forward).parameters)
        cache = {name: DynamicCache(config=model.config)}
        model(ids[:, :-1], **cache)
        model(ids[:, -1:], **cache)

    def prefill(model, ids):
        model(ids[:, :-1])

    both, first = (collect_attention_stats(model, [ids], ["self_attn"], run=r, std="row") for r in (step, prefill))
    reference = collect_attention_stats(llama(attn_implementation="eager"), [ids], ["self_attn"], run=step, std="row")
    for name, m in both.modules.items():
        assert len(m.std) == 4
        assert m.calls == 2
        assert m.std != first.modules[name].std
        torch.testing.assert_close(m.std, reference.modules[name].std, rtol=1e-4, atol=0)


def test_padding_of_another_sequence_does_not_count_as_its_own(plain, tokens):
    """An action sequence may be as long as the prompt; the prompt's padding says nothing about it."""
    model = plain()
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[:, 4:] = 0
    batches = [{"x": x, "attention_mask": mask} for x in tokens]
    stats = collect_attention_stats(model, batches, ["attn"], run=lambda m, b: m["attn"](b["x"]))
    assert stats == collect_attention_stats(model, tokens, ["attn"], run=run)


def test_it_leaves_no_trace(llama, ids):
    model = llama().train()
    model.model.layers[0].eval()
    before = copy.deepcopy(model)
    random = torch.get_rng_state()
    collect_attention_stats(model, [{"input_ids": ids}], ["self_attn"])
    assert torch.equal(torch.get_rng_state(), random)
    for (name, now), (_, then) in zip(model.named_modules(), before.named_modules(), strict=True):
        assert vars(now).keys() == vars(then).keys(), name
        assert now.training == then.training
        assert not any((now._forward_hooks, now._forward_pre_hooks, now._forward_hooks_always_called))


def test_it_leaves_no_trace_of_a_run_that_fails(plain, tokens):
    model = plain()

    def fail(model, batch):
        model["attn"](batch[..., :-1])

    with pytest.raises(RuntimeError, match="shapes"):
        collect_attention_stats(model, tokens, ["attn"], run=fail)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    run(model, tokens[0])


def test_a_batch_always_sees_the_same_noise(plain, tokens):
    model = plain()

    def noisy(model, batch):
        model["attn"](torch.randn_like(batch))

    first, second = (collect_attention_stats(model, tokens, ["attn"], run=noisy) for _ in range(2))
    other = collect_attention_stats(model, tokens, ["attn"], run=noisy, seed=7)
    assert first == second != other


@pytest.mark.parametrize(
    ("targets", "batches", "says"),
    [
        (["nothing"], [torch.zeros(1, 2, WIDTH)], "no attention module fits 'nothing'"),
        ([], [torch.zeros(1, 2, WIDTH)], "an empty list of targets"),
        (["attn"], [], "no batches to calibrate with"),
        (["attn.q"], [torch.zeros(1, 2, WIDTH)], "holds nothing, but no query projection"),
    ],
)
def test_what_cannot_be_measured_is_refused(plain, targets, batches, says):
    with pytest.raises(ValueError, match=says):
        collect_attention_stats(plain(), batches, targets, run=run)


def test_attention_without_logits_is_refused(plain, tokens):
    model = plain()
    with pytest.raises(ValueError, match="attn: saw no attention logits"):
        collect_attention_stats(model, tokens, ["attn"], run=lambda m, b: m["attn"].q(b))


def test_fused_projections_are_refused(plain, tokens):
    model = plain()
    model["attn"].q = None
    model["attn"].to_qkv = nn.Linear(4, 12)
    with pytest.raises(ValueError, match=r"a Plain holds k, v, out, to_qkv, but no query projection .*unfuse"):
        collect_attention_stats(model, tokens, ["attn"], run=run)
