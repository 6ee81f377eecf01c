"""The verb: which layers it takes, what it says about the others, and the way back."""

import weakref

import pytest
import torch
from eff_kernels.edit import SkippedModulesError
from eff_quant import Int8Config, Int8Linear, dequantize_, quantize_
from torch import nn


def reasons(report):
    return {e.name: e.reason for e in report.skipped}


def names(report):
    return [e.name for e in report.changed]


def int8_names(model):
    return [name for name, m in model.named_modules() if isinstance(m, Int8Linear)]


def test_it_quantises_the_linear_layers_and_spares_the_head(llama, ids):
    model = llama(torch.bfloat16)
    before = model(ids).logits
    report = quantize_(model, Int8Config())
    assert len(report.changed) == 14
    assert reasons(report) == {"lm_head": "on the skip list (lm_head)"}
    assert int8_names(model) == names(report)
    assert all(e.bytes_after <= 0.54 * e.bytes_before for e in report.changed)  # tiny rows: 4 bytes of scale for 64
    assert report.bytes_after == sum(e.bytes_after for e in (*report.changed, *report.skipped))
    assert (model(ids).logits - before).abs().max() < 0.05 * before.abs().max()
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_where_and_skip_choose_layers(llama):
    report = quantize_(llama(), Int8Config(skip=("*.layers.1.*", "re:.*k_proj")), where="*.self_attn.*")
    assert [n.removeprefix("model.layers.0.self_attn.") for n in names(report)] == [
        "q_proj",
        "v_proj",
        "o_proj",
    ] or names(report) == [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qvo"]
    assert reasons(report)["model.layers.0.self_attn.k_proj"] == "on the skip list (re:.*k_proj)"
    assert reasons(report)["model.layers.0.mlp.up_proj"] == "not asked for (where)"


def test_the_head_may_be_quantised_if_it_is_not_skipped(llama):
    assert "lm_head" in names(quantize_(llama(), Int8Config(skip=())))


def test_an_output_embedding_of_another_name_is_spared():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.to_words = nn.Linear(8, 8), nn.Linear(8, 30)

        def get_output_embeddings(self):
            return self.to_words

    assert reasons(quantize_(Model(), Int8Config())) == {"to_words": "is the output embedding (lm_head)"}
    assert names(quantize_(Model(), Int8Config(skip=()))) == ["proj", "to_words"]


def test_tied_weights_are_left(llama):
    model = llama(tie_word_embeddings=True)
    report = quantize_(model, Int8Config(skip=()))
    assert reasons(report) == {"lm_head": "weight is tied to model.embed_tokens.weight"}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_strict_refuses_a_surprise_before_it_changes_anything(llama):
    model = llama(tie_word_embeddings=True)
    with pytest.raises(SkippedModulesError, match="lm_head: weight is tied"):
        quantize_(model, Int8Config(skip=()), strict=True)
    assert int8_names(model) == []
    assert len(quantize_(model, Int8Config(), strict=True).changed) == 14  # the skip list is no surprise


def test_experts_that_are_run_in_another_way_are_reported():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts, self.down = 4, nn.Parameter(torch.zeros(4, 32, 48))

    model = nn.Sequential(nn.Linear(32, 32), Experts())
    reason = "is a 3-D parameter [4, 32, 48] of a Experts, not an nn.Linear (stacked experts)"
    assert reasons(quantize_(model, Int8Config()))["1.down"] == reason
    with pytest.raises(SkippedModulesError, match="stacked experts"):
        quantize_(nn.Sequential(nn.Linear(32, 32), Experts()), Int8Config(), strict=True)


def test_conv1d_is_transposed():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, bos_token_id=1, eos_token_id=2)
    ).eval()
    ids = torch.arange(10)[None]
    before, weight = model(ids).logits, model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    report = quantize_(model, Int8Config())
    new = model.transformer.h[0].mlp.c_fc
    assert len(report.changed) == 4
    assert (new.in_features, new.out_features) == (32, 128)
    torch.testing.assert_close(new.dequantize(), weight.T, rtol=0, atol=float(weight.abs().max()) / 200)
    assert (model(ids).logits - before).abs().max() < 0.05 * before.abs().max()


def test_subclasses_of_linear_are_left_alone():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "proj": nn.Linear(16, 16)})
    report = quantize_(model, Int8Config())
    assert names(report) == ["proj"]
    assert "is a NonDynamicallyQuantizableLinear" in reasons(report)["attention.out_proj"]


def test_a_layer_used_twice_stays_one_layer():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"first": shared, "second": shared})
    report = quantize_(model, Int8Config())
    assert names(report) == ["first"]
    assert isinstance(model["first"], Int8Linear)
    assert model["first"] is model["second"]


def test_a_second_call_finds_nothing_to_do(llama):
    model = llama()
    quantize_(model, Int8Config())
    state = model.state_dict()
    report = quantize_(model, Int8Config())
    assert report.changed == []
    assert set(reasons(report).values()) == {"is quantised already", "on the skip list (lm_head)"}
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_progress_counts_the_layers():
    calls = []
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    quantize_(model, Int8Config(), progress=lambda *args: calls.append(args))
    assert calls == [(0, 2, "0"), (1, 2, "2"), (2, 2, "")]


def test_old_weights_are_freed_one_by_one():
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
    old = [weakref.ref(m.weight) for m in model]
    alive = []
    quantize_(model, Int8Config(), progress=lambda *args: alive.append(sum(r() is not None for r in old)))
    assert alive == [4, 3, 2, 1, 0]


def test_static_columns_of_a_layer_that_is_not_quantised_are_an_error(llama):
    config = Int8Config(outlier_weights="original", outlier_columns={"lm_head": (1,)})
    with pytest.raises(ValueError, match="'lm_head', which is not quantised: on the skip list"):
        quantize_(llama(), config)
    config = Int8Config(outlier_weights="original", outlier_columns={"nowhere": (1,)})
    with pytest.raises(ValueError, match="no linear layer of that name"):
        quantize_(llama(), config)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(TypeError, match="no quantisation method for a float; use FP4Config"):
        quantize_(nn.Sequential(), {"threshold": 6.0})
    with pytest.raises(ValueError, match="use from_linear"):
        quantize_(nn.Linear(4, 4), Int8Config())


def test_dequantising_gives_linear_layers_with_the_stored_weights(llama, ids):
    model = llama(torch.bfloat16)
    config = model.config.to_dict()
    quantize_(model, Int8Config(activation="none"))
    stored = model.model.layers[0].mlp.up_proj.dequantize(torch.bfloat16)
    y = model(ids).logits
    report = dequantize_(model)
    assert len(report.changed) == 14
    assert int8_names(model) == []
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, stored)
    assert (model(ids).logits - y).abs().max() < 0.02 * y.abs().max()
    assert model.config.to_dict() == config


def test_dequantising_some_layers(llama):
    model = llama()
    quantize_(model, Int8Config())
    report = dequantize_(model, where="*.mlp.*", dtype=torch.float16)
    assert len(report.changed) == 6
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float16
    assert len(int8_names(model)) == 8
