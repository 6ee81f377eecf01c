"""A model that a layout has quantised is saved, and loads as it was: every kind of layer, and layers of two layouts."""

import itertools

import pytest
import torch
from eff_quant import dequantize_, load
from eff_quant.quantvla import QuantLayout, W4A8Config, W4A8Linear, calibrate_activations, quantize_layout_
from torch import nn

LAYOUT = QuantLayout(include=("*.mlp.*_proj", "q_proj"), exclude=("layers.1",))

# Blocks that divide the columns, leave a tail, and are larger than a row.
KINDS = [
    {"weight_bits": bits, "activation": activation, "block": block, **turns}
    for bits, activation, block, turns in itertools.product(
        (4, 8),
        ("dynamic_token", "static_folded"),
        (16, 32, 128),
        (
            {"rotation": None},
            {"rotation": "hadamard"},
            {"rotation": "svd", "row_rotation": True},
            {"rotation": "svd", "permute": True},
        ),
    )
]


def quantised(llama, ids, config):
    # 50 columns are not a multiple of any block, and their half is odd
    model = llama(hidden_size=48, intermediate_size=50, num_key_value_heads=4)
    layout = QuantLayout(include=LAYOUT.include, exclude=LAYOUT.exclude, bits=(config.weight_bits, 8))
    found = calibrate_activations(model, [ids], layout, config) if config.activation == "static_folded" else None
    report = quantize_layout_(model, layout, config, found)
    assert [e.name for e in report.changed] == [
        "model.layers.0.self_attn.q_proj", *(f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up", "down"))
    ]  # fmt: skip
    return model


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_every_kind_of_layer_loads_as_it_was(llama, ids, tmp_path, kind):
    model = quantised(llama, ids, W4A8Config(**kind))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in again.state_dict().items())
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert {n for n, m in again.named_modules() if isinstance(m, W4A8Linear)} == {
        n for n, m in model.named_modules() if isinstance(m, W4A8Linear)
    }


def test_layers_of_two_layouts(llama, ids, tmp_path):
    model = quantised(llama, ids, W4A8Config(rotation="hadamard", block=16))
    rest = QuantLayout(include=("*.layers.1.mlp.*_proj",), bits=(8, 8))
    quantize_layout_(model, rest, W4A8Config(weight_bits=8, rotation=None))
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(ids).logits, model(ids).logits)
    dequantize_(model)
    model.save_pretrained(tmp_path / "float")
    assert torch.equal(type(model).from_pretrained(tmp_path / "float")(ids).logits, model(ids).logits)


def test_a_layer_under_two_names_is_one_layer(tmp_path):
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    quantize_layout_(model, QuantLayout(include=("a.0",)), W4A8Config(block=16))
    assert isinstance(model["a"][0], W4A8Linear)
    assert model["a"][0] is model["b"][0]


def test_a_diffusers_model(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=4, num_embeds_ada_norm=4,
        norm_num_groups=2,
    )  # fmt: skip
    quantize_layout_(model, QuantLayout.preset("dit"), W4A8Config(block=16, row_rotation=True))
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in load(tmp_path).state_dict().items())
