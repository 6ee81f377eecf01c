"""Rules: edits before and after the softmax, order, observers, and what is refused."""

import threading

import pytest
import torch
from eff_kernels.edit import SkippedModulesError
from eff_kernels.edit.attention import (
    AttentionOutput,
    attend_explicit,
    dense,
    find_attention,
    intercept_attention,
    joint_attention,
    observe_attention,
    rows,
)

pytest.importorskip("transformers")


def plain(call, attend):
    return attend(call)


def first_call(model, arguments, **more):
    calls = []
    with torch.no_grad(), observe_attention(model, lambda c, o: calls.append((c, o)), **more):
        model(**arguments)
    return calls[0]


@torch.no_grad()
def test_weights_of_some_heads_and_rows_only(zoo):
    model, arguments = zoo("llama")
    _, before = first_call(model, arguments)

    def sharpen(weights, part):
        assert part.heads.tolist() == [1, 2]
        assert part.rows.tolist() == list(range(4, 12))
        assert weights.shape == (2, 2, 8, 12)
        return weights**2 / (weights**2).sum(-1, keepdim=True)

    with intercept_attention(model, lambda c, a: a.with_weights(c, sharpen, heads=[2, 1], rows=slice(4, None))):
        call, after = first_call(model, arguments)
    same = torch.ones(4, 12, dtype=torch.bool)
    same[1:3, 4:] = False
    assert torch.equal(after.out.transpose(1, 2)[:, same.T], before.out.transpose(1, 2)[:, same.T])
    weights = rows(call, slice(4, None), [1, 2])
    weights = weights**2 / (weights**2).sum(-1, keepdim=True)
    want = weights @ call.v.repeat_interleave(2, 1)[:, [1, 2]]
    torch.testing.assert_close(after.out[:, [1, 2], 4:], want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_logits_stay_hidden_and_sinks_keep_their_share(zoo):
    model, arguments = zoo("gpt_oss")

    def lift(logits, part):
        assert (logits == -torch.inf).eq(~part.keep.expand_as(logits)).all()
        return torch.where(part.heads[:, None, None] == 1, 0.0, logits)  # hidden ones too

    with intercept_attention(model, lambda c, a: a.with_logits(c, lift)):
        call, output = first_call(model, arguments, needs=["weights"])
    keep = call.keep_mask().expand(2, 1, 12, 12)[:, 0].double()
    want = keep / (keep.sum(-1, keepdim=True) + call.sinks[1].double().exp())
    assert call.sinks is not None
    torch.testing.assert_close(output.weights[:, 1].double(), want, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_two_edits_compose(zoo):
    model, arguments = zoo("llama")

    def to_first(weights, part):
        return torch.nn.functional.one_hot(
            torch.zeros(weights.shape[:-1], dtype=torch.int64), weights.shape[-1]
        ).float()

    def halve(weights, part):
        return weights / 2

    outer = intercept_attention(model, lambda c, a: a.with_weights(c, to_first, heads=[0]), order=0)
    inner = intercept_attention(model, lambda c, a: a.with_weights(c, halve, heads=[0, 3]), order=1)
    call, output = first_call(model, arguments)
    torch.testing.assert_close(output.out[:, 0], (call.v[:, 0, :1] / 2).expand(2, 12, 16))
    torch.testing.assert_close(output.out[:, 3], attend_explicit(call, heads=[3]).out[:, 0] / 2, atol=1e-5, rtol=1e-5)
    outer.remove()
    _, output = first_call(model, arguments)
    torch.testing.assert_close(output.out[:, [0, 3]], attend_explicit(call, heads=[0, 3]).out / 2, atol=1e-5, rtol=1e-5)
    inner.remove()
    torch.testing.assert_close(first_call(model, arguments)[1].out, dense(call).out, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_eager_host_returns_the_edited_weights(zoo):
    model, arguments = zoo("llama")
    model.set_attn_implementation("eager")
    before = model(**arguments, output_attentions=True).attentions
    with intercept_attention(
        model, lambda c, a: a.with_weights(c, lambda w, p: w / 2, heads=[1]), where="re:.*layers.0.*"
    ):
        after = model(**arguments, output_attentions=True).attentions
    torch.testing.assert_close(after[0][:, 1], before[0][:, 1] / 2)
    assert torch.equal(after[0][:, [0, 2, 3]], before[0][:, [0, 2, 3]])


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_changed_calls(zoo, implementation):
    """What a rule changes is computed, even where the host's function would not look at it."""
    model, arguments = zoo("llama")
    model.set_attn_implementation(implementation)
    call, output = first_call(model, arguments)
    close = {"atol": 2e-5, "rtol": 1e-5}
    keep = call.keep_mask().expand(1, 1, 12, 12) if call.mask is None else call.keep_mask()
    changes = {
        "scale": {"scale": 0.1},
        "softcap": {"softcap": 1.5},
        "sinks": {"sinks": torch.arange(4.0)},
        "bias": {"bias": torch.randn(1, 4, 12, 12)},
        "values": {"v": torch.randn_like(call.v)},
        "mask": {"mask": torch.arange(12)[None, None, None] % 3 != 1},
        "additive mask": {"mask": torch.randn(2, 1, 12, 12)},
        "mask and causality": {"mask": keep & (torch.arange(12) % 3 != 1), "causal": False},
        "keys": {"k": torch.cat([call.k, call.k[:, :, :2]], 2), "v": torch.cat([call.v, call.v[:, :, :2]], 2),
                 "mask": torch.ones(1, 1, 1, 14, dtype=torch.bool), "causal": False},
    }  # fmt: skip
    for name, change in changes.items():
        with intercept_attention(model, lambda c, a, change=change: a(c.replace(**change))):
            _, got = first_call(model, arguments)
        new = call.replace(**change)
        want = attend_explicit(new)
        torch.testing.assert_close(got.out, want.out, **close, msg=name)
        assert (got.out - output.out).abs().max() > 1e-3, name


@torch.no_grad()
def test_causality_survives_a_new_mask(zoo):
    model, arguments = zoo("llama")
    seen = {"mask": torch.arange(12)[None, None, None] != 1}
    with intercept_attention(model, lambda c, a: a(c.replace(**seen))):
        _, output = first_call(model, arguments)
        changed = {**arguments, "input_ids": arguments["input_ids"].clone()}
        changed["input_ids"][:, 8:] = 3
        _, other = first_call(model, changed)
    assert torch.equal(output.out[:, :, :8], other.out[:, :, :8])


def test_two_editors_need_an_order(zoo):
    model, _ = zoo("llama")
    handle = intercept_attention(model, plain, where="*layers.0*")
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn has 2 rules .* order \[None, None\]"):
        intercept_attention(model, plain)
    assert "_eff_attention" not in model.model.layers[1].self_attn.__dict__
    handle.remove()
    with intercept_attention(model, plain, order=1), pytest.raises(ValueError, match=r"\[1, 1\]"):
        intercept_attention(model, plain, order=1)
    assert not any("_eff_attention" in m.__dict__ for m in model.modules())
    assert type(model.model.layers[0].self_attn.config) is type(model.config)


@torch.no_grad()
@pytest.mark.parametrize("gone", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
@pytest.mark.parametrize("name", ["llama", "timm_style", "flux"])
def test_handles_go_in_any_order(zoo, gone, name):
    model, arguments = zoo(name)
    before = zoo.answer(model, arguments)
    log = []

    def tell(number):
        def rule(call, attend):
            log.append(number)
            return attend(call).out * (1 + number)

        return rule

    handles = [intercept_attention(model, tell(n), order=n) for n in (1, 2)]
    handles.append(observe_attention(model, lambda c, o: log.append("seen")))
    zoo.answer(model, arguments)
    assert log[:3] == [1, 2, "seen"]
    for index in gone:
        assert not torch.equal(zoo.answer(model, arguments), before) or index == gone[-1]
        handles[index].remove()
    assert torch.equal(zoo.answer(model, arguments), before)
    assert not any("_eff_attention" in m.__dict__ or "forward" in m.__dict__ for m in model.modules())


@torch.no_grad()
def test_observers_see_the_end_or_the_middle(zoo):
    model, arguments = zoo("llama")
    seen = {}
    with (
        intercept_attention(model, lambda c, a: a(c.replace(q=c.q * 2)).out * 3, order=0),
        observe_attention(model, lambda c, o: seen.setdefault("end", (c, o))),
        observe_attention(model, lambda c, o: seen.setdefault("middle", (c, o)), order=1),
    ):
        model(**arguments)
    assert torch.equal(seen["middle"][0].q, seen["end"][0].q * 2)
    assert torch.equal(seen["middle"][1].out * 3, seen["end"][1].out)


def test_observers_without_and_with_gradients(zoo):
    model, arguments = zoo("llama")
    kept = []
    with observe_attention(model, lambda c, o: kept.append(rows(c, [-1]))):
        model(**arguments)
    assert not kept[0].requires_grad
    with observe_attention(model, lambda c, o: kept.append(rows(c, [-1])), grad=True):
        model(**arguments)
    kept[-1].square().sum().backward()
    assert model.model.layers[1].self_attn.q_proj.weight.grad.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("own", [False, True])
def test_observers_see_other_threads_or_only_their_own(zoo, own):
    model, arguments = zoo("llama")
    seen = []
    with observe_attention(model, lambda c, o: seen.append(threading.get_ident()), own_thread=own):
        model(**arguments)
        other = threading.Thread(target=torch.no_grad()(lambda: model(**arguments)))
        other.start()
        other.join()
    layers = len(model.model.layers)
    assert seen.count(threading.get_ident()) == layers
    assert len(seen) == (layers if own else 2 * layers)


@pytest.mark.parametrize(("rule", "error", "text"), [
    (lambda c, a: None, TypeError, "must return a tensor or AttentionOutput, not NoneType"),
    (lambda c, a: a(c).out[:, :1], ValueError, r"returned \[2, 1, 12, 16\], wanted \[2, 4, 12, 16\]"),
    (lambda c, a: a(c).out.double(), TypeError, "returned torch.float64, wanted torch.float32"),
    (lambda c, a: a.with_weights(c, lambda w, p: w[:, :1]), ValueError, "tensor of the shape it got"),
    (lambda c, a: a.with_weights(c, lambda w, p: w, heads=[9]), ValueError, r"heads must be in 0..3, got \[9\]"),
    (lambda c, a: a(c.replace(kyes=1)), TypeError, "kyes"),
])  # fmt: skip
def test_wrong_rules(zoo, rule, error, text):
    model, arguments = zoo("llama")
    with intercept_attention(model, rule), pytest.raises(error, match=text):
        model(**arguments)


def test_a_rule_without_weights_inside_of_one_that_edits_them(zoo):
    model, arguments = zoo("llama")
    inner = intercept_attention(model, lambda c, a: c.q, order=1)
    outer = intercept_attention(model, lambda c, a: a.with_weights(c, lambda w, p: w), order=0)
    with pytest.raises(RuntimeError, match="computes no weights, but an outer rule changes them"):
        model(**arguments)
    inner.remove()
    outer.remove()


def test_needs(zoo):
    model, arguments = zoo("llama")
    with pytest.raises(ValueError, match=r"needs may hold \['lse', 'roles', 'weights'\], got \['maps'\]"):
        intercept_attention(model, plain, needs=["maps"])
    call, output = first_call(model, arguments, needs=["weights", "lse"])
    weights = call.q @ call.k.repeat_interleave(2, 1).mT * call.scale + torch.full((12, 12), -torch.inf).triu(1)
    torch.testing.assert_close(output.weights, weights.softmax(-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.lse, weights.logsumexp(-1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "sd3", "timm_style"])
def test_what_a_rule_puts_into_an_attention_is_none_of_the_model(zoo, name):
    class InnerAttention(torch.nn.Module):
        def forward(self, q, k, v):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    model, _ = zoo(name)
    before = [f.name for f in find_attention(model)]
    with intercept_attention(model, plain):
        for found in before:
            model.get_submodule(found).inner = InnerAttention()
        assert [f.name for f in find_attention(model)] == before


def test_what_cannot_be_reached_is_named(zoo):
    model, _ = zoo("siglip")
    found = {f.name: f.reason for f in find_attention(model) if not f.way}
    assert list(found) == ["head.attention"]
    assert "torch.nn.MultiheadAttention computes inside PyTorch" in found["head.attention"]
    with pytest.raises(SkippedModulesError, match=r"head\.attention"):
        intercept_attention(model, plain, strict=True)
    with pytest.raises(ValueError, match="no attention was found to intercept"):
        intercept_attention(model, plain, where="head.attention")
    with pytest.raises(ValueError, match="no attention was found to intercept"):
        intercept_attention(torch.nn.Linear(2, 2), plain)


def test_a_module_that_takes_another_way_says_so(zoo):
    class Own(torch.nn.Module):
        def forward(self, x):
            return x.softmax(-1)

    model = torch.nn.Sequential(Own())
    with intercept_attention(model, plain, where="0") as handle:
        assert handle.report.changed
        with pytest.raises(RuntimeError, match=r"0 \(Own\) did not call scaled_dot_product_attention"):
            model(torch.ones(2, 2))
    assert torch.equal(model(torch.zeros(1, 2)), torch.full((1, 2), 0.5))


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 3, 4, 5, 8)])
@pytest.mark.parametrize("causal", [False, True])
def test_calls_of_any_rank(shape, causal):
    class Own(torch.nn.Module):
        def forward(self, x):
            mask = None if causal else torch.ones(5, 5, dtype=torch.bool).tril()
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, mask, is_causal=causal)

    model, x = torch.nn.Sequential(Own()), torch.randn(shape)
    before = model(x)
    with intercept_attention(model, lambda c, a: attend_explicit(c), where="0"):
        torch.testing.assert_close(model(x), before, atol=1e-6, rtol=1e-5)
    with intercept_attention(model, lambda c, a: AttentionOutput(a(c).out), where="0"):
        assert torch.equal(model(x), before)


@torch.no_grad()
def test_streams_of_joint_attention(zoo):
    seen = {}

    def look(call, output):
        seen[call.name] = call.streams

    for name, order in (("sd3", ["image", "text"]), ("flux", ["text", "image"])):
        model, arguments = zoo(name)
        with observe_attention(model, look):
            zoo.answer(model, arguments)
        joint = [s for n, s in seen.items() if not n.endswith("attn2")]
        assert len(joint) == (3 if name == "sd3" else 4)
        for streams in joint:
            assert list(streams) == order
            assert {n: s.stop - s.start for n, s in streams.items()} == {"image": 16, "text": 5}
        seen.clear()
    # FLUX tells how it rotated: back to where queries have no place
    turned = []
    model, arguments = zoo("flux")
    with observe_attention(model, lambda call, _: turned.append(call)):
        zoo.answer(model, arguments)
    for call in turned:
        cos, sin = call.extra["image_rotary_emb"]
        assert cos.shape == sin.shape == (call.num_queries, call.q.shape[-1])
    # the text stream is where the text arrives: a changed prompt changes its keys alone in the first block
    model, arguments = zoo("flux")
    keys = []
    with observe_attention(model, lambda c, o: keys.append((c.k, c.streams)), where="transformer_blocks.0.attn"):
        zoo.answer(model, arguments)
        zoo.answer(model, {**arguments, "encoder_hidden_states": torch.randn(2, 5, 32)})
    (old, streams), (new, _) = keys
    assert torch.equal(old[:, :, streams["image"]], new[:, :, streams["image"]])
    assert not torch.isclose(old[:, :, streams["text"]], new[:, :, streams["text"]]).all()


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@torch.no_grad()
def test_streams_of_mochi_leave_padding_out(zoo):
    from diffusers import MochiTransformer3DModel

    model = MochiTransformer3DModel(
        num_attention_heads=8, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=16, time_embed_dim=4,
    ).eval()  # fmt: skip
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    given = {
        "hidden_states": torch.randn(2, 4, 1, 8, 8), "encoder_hidden_states": torch.randn(2, 6, 16),
        "timestep": torch.tensor([500.0, 500.0]), "encoder_attention_mask": mask,
    }  # fmt: skip
    names = ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    assert joint_attention(model) == names
    before, seen = model(**given).sample, []
    with observe_attention(model, lambda c, o: seen.append((c.name, dict(c.streams)))):
        assert torch.equal(model(**given).sample, before)
    both = [{"image": slice(0, 16), "text": slice(16, end)} for end in (22, 20)]
    assert seen == [(name, streams) for name in names for streams in both]
    assert "forward" not in vars(model.transformer_blocks[0].attn1)


def test_joint_attention_of_models(zoo):
    assert joint_attention(zoo("sd3")[0]) == [f"transformer_blocks.{i}.attn" for i in range(3)]
    kinds = ("transformer_blocks", "single_transformer_blocks")
    assert joint_attention(zoo("flux")[0]) == [f"{kind}.{i}.attn" for kind in kinds for i in range(2)]
    assert joint_attention(zoo("unet")[0]) == []


@torch.no_grad()
def test_cross_attention_is_known(zoo):
    for name, cross in (
        ("unet", "attn2"), ("whisper", "encoder_attn"), ("t5", "EncDecAttention"),
    ):  # fmt: skip
        model, arguments = zoo(name)
        seen = {}
        with observe_attention(model, lambda c, o, seen=seen: seen.__setitem__(c.name, c.is_cross)):
            zoo.answer(model, arguments)
        assert {n for n, x in seen.items() if x} == {n for n in seen if n.endswith(cross)}
        assert any(seen.values())
