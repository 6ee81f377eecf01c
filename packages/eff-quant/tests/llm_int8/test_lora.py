"""LoRA through PEFT on an int8 base: it learns, the base stays as it is, and merging works through merge_lora."""

import copy

import pytest
import torch
from eff_quant import Int8Config, Int8Linear, load, merge_lora, quantize_

peft = pytest.importorskip("peft")

# PEFT asks transformers for a property that is being renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def adapted(model, **settings):
    values = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    return peft.get_peft_model(model, peft.LoraConfig(**values))


def int8_bytes(model):
    return {name: (m.codes.clone(), m.SCB.clone()) for name, m in model.named_modules() if isinstance(m, Int8Linear)}


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_adapters_learn_while_the_base_stays_byte_for_byte(llama, threshold):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # a random head of the usual size is too flat to say anything with certainty
    quantize_(model, Int8Config(threshold=threshold))
    model = adapted(model)
    wrapped = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(wrapped.base_layer, Int8Linear)
    before = int8_bytes(model)
    assert len(before) == 14
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 3 * 2
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    ids = torch.randint(0, 256, (4, 12))  # four sentences to learn by heart
    losses = []
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    after = int8_bytes(model)
    assert all(torch.equal(a, b) for name in before for a, b in zip(before[name], after[name], strict=True))


def test_gradients_reach_adapters_in_every_layer(llama, ids):
    model = llama()
    quantize_(model, Int8Config())
    model = adapted(model, init_lora_weights=False)
    model(ids, labels=ids).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.abs().sum() > 0 for g in grads)


def test_an_adapter_saves_and_loads_on_the_int8_base(llama, ids, tmp_path):
    base = llama()
    quantize_(base, Int8Config())
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, init_lora_weights=False).eval()
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(again(ids).logits, expected)


def test_merging_gives_the_same_model_within_int8(llama, ids, tmp_path):
    model = llama()
    quantize_(model, Int8Config(threshold=0.0))
    base = model(ids).logits
    before = int8_bytes(model)
    model = adapted(model, init_lora_weights=False).eval()
    expected = model(ids).logits
    merged, report = merge_lora(model)
    assert len(report.changed) == 6
    y = merged(ids).logits
    assert (y - expected).abs().max() < 0.1 * (expected - base).abs().max()
    after = int8_bytes(merged)
    assert after.keys() == before.keys()
    for name in before:
        same = torch.equal(before[name][0], after[name][0])
        assert same == (name not in {e.name for e in report.changed})
    merged.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(ids).logits, y)


def test_merging_keeps_static_columns(llama, ids):
    name = "model.layers.1.mlp.down_proj"
    model = llama(torch.bfloat16)
    quantize_(model, Int8Config(outlier_weights="original", outlier_columns={name: (3, 9)}))
    model = adapted(model, init_lora_weights=False).eval()
    delta = model.base_model.model.get_submodule(name).get_delta_weight("default")
    kept = model.base_model.model.get_submodule(name).base_layer.outlier_weight.clone()
    merged, _ = merge_lora(model)
    layer = merged.get_submodule(name)
    assert layer.outlier_columns.tolist() == [3, 9]
    expected = kept.float() + delta[:, [3, 9]].float()
    torch.testing.assert_close(layer.outlier_weight.float(), expected, rtol=2**-8, atol=1e-6)


def test_their_own_merge_does_what_ours_does(llama, ids):
    model = llama()
    quantize_(model, Int8Config())
    model = adapted(model, init_lora_weights=False)
    theirs = copy.deepcopy(model).merge_and_unload()
    ours, _ = merge_lora(model)
    assert int8_bytes(theirs).keys() == int8_bytes(ours).keys()
    for name, (codes, absmax) in int8_bytes(ours).items():
        assert torch.equal(int8_bytes(theirs)[name][0], codes)
        assert torch.equal(int8_bytes(theirs)[name][1], absmax)


def test_there_must_be_something_to_merge(llama):
    with pytest.raises(TypeError, match="merge_lora takes a PEFT model, got LlamaForCausalLM"):
        merge_lora(llama())
    with pytest.raises(ValueError, match="no quantised layer has an adapter"):
        merge_lora(adapted(llama()))


def test_quantising_under_adapters_leaves_the_adapters(llama, ids):
    model = adapted(llama(), init_lora_weights=False).eval()
    before = model(ids).logits
    report = quantize_(model, Int8Config())
    assert len(report.changed) == 14
    left = {e.reason for e in report.skipped}
    assert left == {"belongs to an adapter", "on the skip list (lm_head)"}
    assert (model(ids).logits - before).abs().max() < 0.05 * before.abs().max()
