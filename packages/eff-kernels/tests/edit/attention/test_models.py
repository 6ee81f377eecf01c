"""Each class of model: a rule that changes nothing changes nothing, and what a call tells is the whole truth."""

import copy

import pytest
import torch
from eff_kernels.edit.attention import AttentionCall, attend_explicit, find_attention, intercept_attention

pytest.importorskip("transformers")
pytest.importorskip("diffusers")


def oracle(call: AttentionCall) -> tuple[torch.Tensor, float]:
    """Attention in float64 as one would write it on a board, with one key head for each query head, and a tolerance.

    An error of a float32 logit of size s is about 2**-24 s for each of the roundings on its way, and moves a weight by
    that share of itself.
    """
    q, k, v = call.q.double(), call.k.double(), call.v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * call.scale
    if call.softcap:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    if call.bias is not None:
        logits = logits + call.bias.double()
    if call.causal:
        logits = logits + torch.full(logits.shape[-2:], -torch.inf).double().triu(1)
    if call.mask is not None:
        if call.mask.dtype == torch.bool:
            logits = logits.masked_fill(~call.mask, -torch.inf)
        else:
            logits = logits + call.mask.double()
    finite = logits[logits > -1e30]
    top = logits.exp()
    bottom = top.sum(-1, keepdim=True)
    if call.sinks is not None:
        bottom = bottom + call.sinks.double().exp()[:, None, None]
    return (top / bottom) @ v, 2.0**-22 * (4 + finite.abs().max().item()) * v.abs().max().item()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_call_explains_the_host(each_model, implementation, zoo):
    model, arguments = zoo(each_model)
    if hasattr(model, "set_attn_implementation"):
        try:
            model.set_attn_implementation(implementation)
        except ValueError:
            pytest.skip(f"{each_model} has no {implementation}")
    elif implementation == "eager":
        pytest.skip("not a model of transformers")
    plain = zoo.answer(model, arguments)
    seen = []

    def untouched(call, attend):
        output = attend(call)
        want, tolerance = oracle(call)
        assert output.out.shape == (call.q.shape[0], call.num_heads, call.num_queries, call.v.shape[-1])
        assert (output.out - want).abs().max() < tolerance
        assert (attend_explicit(call).out - want).abs().max() < tolerance
        seen.append(call.name)
        return output

    handle = intercept_attention(model, untouched)
    reached = [f.name for f in find_attention(model) if f.way]
    assert [e.name for e in handle.report.changed] == reached
    assert torch.equal(zoo.answer(model, arguments), plain)
    assert set(seen) == set(reached)
    handle.remove()
    assert torch.equal(zoo.answer(model, arguments), plain)


@torch.no_grad()
def test_a_change_arrives_and_goes(each_model, zoo):
    model, arguments = zoo(each_model)
    before = copy.deepcopy(model.state_dict())
    plain = zoo.answer(model, arguments)
    with intercept_attention(model, lambda call, attend: attend(call).out * 0.5) as handle:
        assert handle.active
        changed = zoo.answer(model, arguments)
        assert (changed - plain).abs().max() > 1e-4
        assert model.state_dict().keys() == before.keys()
    assert torch.equal(zoo.answer(model, arguments), plain)
    assert not any("_eff_attention" in m.__dict__ or "forward" in m.__dict__ for m in model.modules())
