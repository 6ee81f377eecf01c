"""Static scales of activations: over all batches, saved and loaded, applied."""

import pytest
import torch
from eff_quant.quantvla import ActivationCalibration, QuantLayout, W4A8Config, calibrate_activations, quantize_layout_
from torch import nn

LAYOUT = QuantLayout(include=("0", "2"))
PLAIN = W4A8Config(activation="static_folded", rotation=None)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 70), nn.ReLU(), nn.Linear(70, 30), nn.Linear(30, 3))


def batches():
    return [torch.randn(50, 100, generator=torch.Generator().manual_seed(i)) * (1 + i) for i in range(4)]


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_all_batches_count_not_the_first_alone(reduce):
    config = W4A8Config(activation="static_folded", rotation=None, reduce=reduce)
    found = calibrate_activations(model(), batches(), LAYOUT, config)
    each = torch.stack([torch.quantile(b.abs(), 0.999, dim=0) for b in batches()])
    wanted = (each.amax(0) if reduce == "max" else each.mean(0)) / 127
    torch.testing.assert_close(found.layers["0"].input_scale, wanted)
    assert not torch.allclose(found.layers["0"].input_scale, each[0] / 127, rtol=0.5)
    assert found.calls == 8


def test_pieces_of_columns_change_nothing(monkeypatch):
    whole = calibrate_activations(model(), batches(), LAYOUT, PLAIN)
    monkeypatch.setattr("eff_quant.quantvla.calibrate.CHUNK", 300)
    parts = calibrate_activations(model(), batches(), LAYOUT, PLAIN)
    assert all(torch.equal(v.input_scale, parts.layers[k].input_scale) for k, v in whole.layers.items())


def test_columns_without_signal_get_the_smallest_step():
    data = [b.index_fill(1, torch.tensor([3]), 0) for b in batches()]
    found = calibrate_activations(model(), data, LAYOUT, PLAIN)
    assert found.layers["0"].input_scale[3] == pytest.approx(1e-6)


def test_padding_does_not_count():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(8, 4)

        def forward(self, x, attention_mask):
            return self.proj(x)

    x = torch.randn(2, 5, 8)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    x[0, :2] = 100
    layout = QuantLayout(include=("proj",))
    found = calibrate_activations(Masked(), [{"x": x, "attention_mask": mask}], layout, PLAIN)
    wanted = torch.quantile(x[mask.bool()].abs(), 0.999, dim=0) / 127
    torch.testing.assert_close(found.layers["proj"].input_scale, wanted)


@pytest.mark.parametrize("more", [{"rotation": None}, {}, {"permute": True}, {"rotation": "hadamard"}])
def test_it_travels_as_a_file(tmp_path, more):
    config = W4A8Config(activation="static_folded", **more)
    first, second = model(), model()
    found = calibrate_activations(first, batches(), LAYOUT, config)
    found.save(tmp_path / "scales.safetensors")
    loaded = ActivationCalibration.load(tmp_path / "scales.safetensors")
    quantize_layout_(first, LAYOUT, config, found)
    quantize_layout_(second, LAYOUT, config, loaded)
    x = batches()[0]
    assert torch.equal(first(x), second(x))
    assert loaded.calls == found.calls


def test_the_blend_of_the_permutation_has_an_effect():
    data = [b * torch.linspace(0.1, 4, 100) for b in batches()]
    orders = []
    for blend in (0.0, 0.15, 1.0):
        config = W4A8Config(activation="static_folded", permute=True, permute_blend=blend)
        orders.append(calibrate_activations(model(), data, LAYOUT, config).layers["0"].permutation.tolist())
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_model_is_left_as_it_was():
    net = model().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    calibrate_activations(net, batches(), LAYOUT, W4A8Config(permute=True))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_a_layer_that_was_never_called_is_named():
    net = model()
    with pytest.raises(ValueError, match=r"1 layers were never called .*, the first is '2'"):
        calibrate_activations(net, batches(), LAYOUT, PLAIN, run=lambda m, b: m[0](b))
    with pytest.raises(ValueError, match="no batches"):
        calibrate_activations(net, [], LAYOUT, PLAIN)


def test_missing_calibration_is_found_before_anything_changes():
    net = model()
    part = calibrate_activations(net, batches(), QuantLayout(include=("0",)), PLAIN)
    with pytest.raises(ValueError, match="no calibration of 1 layers such as '2'"):
        quantize_layout_(net, LAYOUT, PLAIN, part)
    assert all(type(m) is nn.Linear for m in (net[0], net[2]))
    with pytest.raises(ValueError, match=r"the layout has bits=\(4, 8\), the config weight_bits=8"):
        quantize_layout_(net, LAYOUT, W4A8Config(weight_bits=8))


def test_the_report_names_every_linear_layer():
    report = quantize_layout_(model(), LAYOUT, W4A8Config(skip=("2",)))
    assert [e.name for e in report.changed] == ["0"]
    assert {e.name: e.reason for e in report.skipped} == {"2": "on the skip list (2)", "3": "not asked for (where)"}


def test_a_second_quantisation_is_refused():
    net = model()
    quantize_layout_(net, LAYOUT, W4A8Config())
    with pytest.raises(ValueError, match="0 is quantised already"):
        quantize_layout_(net, LAYOUT, W4A8Config())
