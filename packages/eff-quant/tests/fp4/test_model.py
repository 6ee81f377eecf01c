"""FP4 in whole models: groups that share a scale, saving and loading, adapters."""

import pytest
import torch
from eff_quant import FP4Config, FP4Linear, calibrate_fp4, dequantize_, load, merge_lora, quantize_
from torch import nn

CONFIGS = [
    FP4Config(),
    FP4Config(format="mxfp4", scale_rounding="even", activations="dynamic"),
    FP4Config(activations="static", skip=("lm_head", "*.mlp.*")),
]


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, FP4Linear)}


def bytes_of(model):
    return {
        name: tensor.clone().view(torch.uint8)
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[2] in ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def test_groups_share_a_scale_and_others_do_not(llama):
    model = llama()
    quantize_(model, FP4Config())
    scales = {name: m.weight_global_scale.item() for name, m in layers(model).items()}
    for i in range(2):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        assert len({scales[attention + p] for p in ("q_proj", "k_proj", "v_proj")}) == 1
        assert scales[mlp + "gate_proj"] == scales[mlp + "up_proj"]
    assert len(set(scales.values())) == 8
    alone = llama()
    quantize_(alone, FP4Config(fuse_groups=()))
    assert len({m.weight_global_scale.item() for m in layers(alone).values()}) == 14


def test_layers_that_do_not_fit_are_left_with_the_reason():
    model = nn.Sequential(nn.Linear(40, 48), nn.Linear(48, 8))
    report = quantize_(model, FP4Config())
    assert [e.reason for e in report.skipped] == ["in_features=40 is not a multiple of 16, the block of nvfp4"]
    report = quantize_(nn.Sequential(nn.Linear(48, 8)), FP4Config(format="mxfp4"))
    assert [e.reason for e in report.skipped] == ["in_features=48 is not a multiple of 32, the block of mxfp4"]


def test_memory_falls_to_the_bits_of_the_format(llama):
    model = llama(torch.bfloat16, num_hidden_layers=4)
    report = quantize_(model, FP4Config(format="mxfp4"))
    before, after = (sum(getattr(e, f"bytes_{w}") for e in report.changed) for w in ("before", "after"))
    assert after == before * 4.25 / 16


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_saves_and_loads_bit_for_bit(llama, ids, tmp_path, config, dtype):
    model = llama(dtype)
    ranges = calibrate_fp4(model, [{"input_ids": ids}])
    float_logits = model(ids).logits.float()
    quantize_(model, config)
    if config.activations == "static":
        ranges.set_input_scales(model)
    logits = model(ids).logits
    assert 0 < (logits - float_logits).abs().max() < 0.4 * float_logits.abs().max()
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert same(bytes_of(model), bytes_of(again))
    assert torch.equal(again(ids).logits, logits)


@pytest.mark.parametrize("config", CONFIGS)
def test_quantising_while_loading_gives_the_same_bytes(llama, tmp_path, config):
    model = llama(torch.bfloat16)
    model.save_pretrained(tmp_path)
    quantize_(model, config)
    assert same(bytes_of(model), bytes_of(load(tmp_path, config)))


def test_loading_dequantises_nothing(llama, tmp_path, monkeypatch):
    model = llama()
    model.save_pretrained(tmp_path / "float")
    quantize_(model, FP4Config())
    model.save_pretrained(tmp_path / "fp4")

    def refuse(self, dtype):
        raise AssertionError("a layer was dequantised")

    monkeypatch.setattr(FP4Linear, "dequantize", refuse)
    load(tmp_path / "fp4")
    load(tmp_path / "float", FP4Config())


def test_dequantising_leaves_a_float_model_with_the_same_output(llama, ids):
    model = llama()
    quantize_(model, FP4Config())
    logits = model(ids).logits
    dequantize_(model)
    assert not layers(model)
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_gpt2_with_its_transposed_layers(ids, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256)).eval()
    before = model(ids).logits
    quantize_(model, FP4Config())
    logits = model(ids).logits
    assert (logits - before).abs().max() < 0.2 * before.abs().max()
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(ids).logits, logits)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[1]])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_learn_while_the_base_stays_byte_for_byte(llama, config):
    peft = pytest.importorskip("peft")
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # a random head of the usual size is too flat to say anything with certainty
    quantize_(model, config)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer, FP4Linear)
    before = bytes_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 3 * 2
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    ids = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(40):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    assert same(before, bytes_of(model))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_merging_adapters_quantises_again(llama, ids):
    peft = pytest.importorskip("peft")
    model = llama()
    quantize_(model, FP4Config())
    base = model(ids).logits
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    expected = model(ids).logits
    merged, report = merge_lora(model)
    assert len(report.changed) == 2
    assert (merged(ids).logits - expected).abs().max() < 0.5 * (expected - base).abs().max()
