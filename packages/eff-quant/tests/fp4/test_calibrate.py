import json

import pytest
import torch
from eff_quant import FP4Config, FP4Linear, InputRanges, calibrate_fp4
from torch import nn


def test_it_sees_the_largest_input_of_each_layer():
    x = torch.randn(3, 40, 32)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    ranges = calibrate_fp4(model, [(x[0],), x[1], {"input": x[2]}])
    assert ranges.tokens == 120
    hidden = model[1](model[0](x))
    assert ranges.amax == {"0": x.abs().max().item(), "2": pytest.approx(hidden.abs().max().item(), rel=1e-6)}


def test_padding_does_not_count(llama, ids):
    model = llama()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    clean = calibrate_fp4(model, [{"input_ids": ids, "attention_mask": mask}])
    with torch.no_grad():
        model.model.embed_tokens.weight[255] = 0.01 * torch.randn(64)
        model.model.embed_tokens.weight[255, 7] = 1e4
    ids[0, :5] = 255
    padded = calibrate_fp4(model, [{"input_ids": ids, "attention_mask": mask}])
    assert clean.tokens == padded.tokens == 19
    name = "model.layers.0.self_attn.q_proj"
    assert padded.amax[name] == clean.amax[name]
    assert calibrate_fp4(model, [{"input_ids": ids}]).amax[name] > clean.amax[name]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_layers_that_share_an_input_share_its_range(llama, ids):
    ranges = calibrate_fp4(llama(), [{"input_ids": ids}])
    for layer in range(2):
        q, k, v = (ranges.amax[f"model.layers.{layer}.self_attn.{p}_proj"] for p in "qkv")
        assert q == k == v


def quantised(linear, **settings):
    return nn.Sequential(FP4Linear.from_linear(linear, FP4Config(**settings)), nn.ReLU())


def test_it_sets_the_scale_of_static_layers():
    linear = nn.Linear(32, 8)
    x = torch.randn(6, 32)
    ranges = calibrate_fp4(nn.Sequential(linear), [x])
    model = quantised(linear, activations="static")
    ranges.set_input_scales(model)
    assert model[0].input_global_scale.item() == (torch.tensor(2688.0) / x.abs().max()).item()
    torch.testing.assert_close(model(x), quantised(linear, activations="dynamic")(x))


def test_a_quantised_model_can_be_calibrated():
    linear = nn.Linear(32, 8)
    x = torch.randn(6, 32)
    model = quantised(linear, activations="static")
    ranges = calibrate_fp4(model, [x])
    assert ranges.amax == {"0": x.abs().max().item()}
    assert model[0].config.activations == "static"


def test_an_input_of_zeros_gets_a_scale_that_works():
    model = quantised(nn.Linear(32, 8), activations="static")
    calibrate_fp4(model, [torch.zeros(2, 32)]).set_input_scales(model)
    assert model[0].input_global_scale == 1
    assert torch.isfinite(model(torch.randn(2, 32))).all()


def test_it_survives_its_file(tmp_path):
    ranges = calibrate_fp4(nn.Sequential(nn.Linear(16, 8)), [torch.randn(50, 16)])
    ranges.save(tmp_path / "ranges.json")
    assert InputRanges.load(tmp_path / "ranges.json") == ranges
    values = json.loads((tmp_path / "ranges.json").read_text())
    (tmp_path / "new.json").write_text(json.dumps({**values, "version": 2}))
    with pytest.raises(ValueError, match="version 2"):
        InputRanges.load(tmp_path / "new.json")
    (tmp_path / "bad.json").write_text(json.dumps({**values, "amax": {"0": float("nan")}}))
    with pytest.raises(ValueError, match=r"the ranges of \['0'\] are not finite"):
        InputRanges.load(tmp_path / "bad.json")


def test_what_cannot_be_calibrated_is_an_error():
    model = nn.Sequential(nn.Linear(32, 8))
    with pytest.raises(ValueError, match="no batches"):
        calibrate_fp4(model, [])
    with pytest.raises(ValueError, match="saw no tokens"):
        calibrate_fp4(model, [torch.ones(1, 32)], where="nowhere")
    with pytest.raises(ValueError, match="the input of 0 holds inf or NaN"):
        calibrate_fp4(model, [torch.full((1, 32), torch.inf)])
    ranges = calibrate_fp4(model, [torch.ones(1, 32)])
    with pytest.raises(ValueError, match="no FP4Linear with activations='static'"):
        ranges.set_input_scales(model)
    with pytest.raises(ValueError, match=r"no calibrated input for \['1'\]"):
        ranges.set_input_scales(nn.Sequential(nn.ReLU(), quantised(model[0], activations="static")[0]))


def test_hooks_are_removed_after_an_error():
    model = quantised(nn.Linear(32, 8), activations="static")
    with pytest.raises(ValueError, match="do not fit"):
        calibrate_fp4(model, [torch.ones(1, 16)])
    assert not model[0]._forward_pre_hooks
    assert model[0].config.activations == "static"
