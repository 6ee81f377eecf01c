"""The layer as a module, and what it computes."""

import copy
import itertools

import pytest
import torch
from eff_quant import dequantize_, load, quantize_
from eff_quant.quantvla import LayerCalibration, QuantLayout, W4A8Config, W4A8Linear, quantize_layout_
from eff_quant.quantvla.calibrate import calibrate_activations
from torch import nn


def calibrated(linear, x, config):
    calibration = calibrate_activations(nn.Sequential(linear), [x], QuantLayout(include=("0",)), config)
    return calibration.layers["0"]


CONFIGS = [
    W4A8Config(weight_bits=bits, activation=activation, **more)
    for bits, activation, more in itertools.product(
        (4, 8),
        ("dynamic_token", "static_folded"),
        ({"rotation": None}, {}, {"row_rotation": True}, {"rotation": "hadamard", "permute": True}),
    )
]


def name(config):
    parts = (config.weight_bits, config.activation, config.rotation, "rows" * config.row_rotation)
    return "-".join(map(str, parts))


def make(config, k=100, n=70, bias=True):
    torch.manual_seed(0)
    linear, x = nn.Linear(k, n, bias=bias), torch.randn(40, k)
    calibration = calibrated(linear, x, config) if config.activation == "static_folded" else None
    return linear, x, W4A8Linear.from_linear(linear, config, calibration)


@pytest.mark.parametrize("config", CONFIGS, ids=name)
@pytest.mark.parametrize(("k", "n"), [(100, 70), (128, 64), (33, 5)])
def test_its_integer_product_is_that_of_emulated_rounding(config, k, n):
    linear, x, layer = make(config, k, n)
    with torch.no_grad():
        y = layer(x)
        turned = layer.rotate_input(x).double()
        step = turned.abs().amax(1, keepdim=True) / 127 if layer.input_scale is None else layer.input_scale.double()
        rounded = ((turned / step).round().clamp(-128, 127) * step)[:, :k]
        # The weight in rotated coordinates: what dequantize() gives, with a rotated input put in.
        weight = layer.codes().double() * layer.scale.double()[:, None]
        if layer.input_scale is not None:
            weight = weight / layer.input_scale[:k]
        wanted = rounded @ weight.T
        if layer.rotation_out is not None:
            from eff_quant.quantvla.rotation import BlockRotation, rotate

            wanted = rotate(wanted, BlockRotation(layer.rotation_out, layer.rotation_out_tail))
        wanted = wanted + linear.bias.double()
    # Codes at a tie may differ between float32 and float64 division; one step of one input is 1/127 of its largest.
    assert float((y - wanted).norm() / wanted.norm()) < 1e-3
    assert float((y - wanted).abs().median() / wanted.abs().median()) < 1e-5


@pytest.mark.parametrize("config", CONFIGS, ids=name)
@torch.no_grad()
def test_it_is_near_the_plain_layer(config):
    linear, x, layer = make(config)
    wanted = linear(x)
    limit = 0.17 if config.weight_bits == 4 else 0.012
    assert float((layer(x) - wanted).norm() / (wanted - linear.bias).norm()) < limit
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("config", CONFIGS, ids=name)
@torch.no_grad()
def test_the_dequantised_weight_is_in_the_original_coordinates(config):
    linear, _, layer = make(config)
    back = layer.to_linear()
    assert float((back.weight - linear.weight).norm() / linear.weight.norm()) < (
        0.17 if config.weight_bits == 4 else 0.012
    )
    assert back.bias is linear.bias


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_a_state_dict_loads_into_a_fresh_layer(config):
    _, x, layer = make(config)
    fresh = W4A8Linear(100, 70, config=config)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    tensors = {n: (t.shape, t.dtype) for n, t in layer.state_dict().items()}
    assert tensors == {n: (t.shape, t.dtype) for n, t in W4A8Linear(100, 70, config=config).state_dict().items()}


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_the_reported_bytes_are_those_of_its_storage(config):
    linear, x, layer = make(config)
    model = nn.Sequential(linear)
    layout = QuantLayout(include=("0",), bits=(config.weight_bits, 8))
    calibration = calibrate_activations(model, [x], layout, config) if config.activation == "static_folded" else None
    entry = quantize_layout_(model, layout, config, calibration).changed[0]
    tensors = (*layer.parameters(), *layer.buffers())
    storage = sum(t.untyped_storage().nbytes() for t in tensors)
    assert entry.bytes_after == storage
    assert entry.bytes_before == 4 * (70 * 100 + 70)
    k, n, block = 100, 70, 64
    wanted = n * k * config.weight_bits // 8 + 4 * n + 4 * n
    wanted += 4 * k if config.activation == "static_folded" else 0
    wanted += 4 * (block**2 + (k - block) ** 2) if config.rotation else 0
    wanted += 4 * (block**2 + (n - block) ** 2) if config.row_rotation else 0
    assert storage == wanted + (8 * k if config.permute else 0)


@pytest.mark.parametrize("move", ["half", "bfloat16", "double", "float", "cpu"])
def test_moves_and_casts_neither_rotate_nor_round_again(move):
    _, x, layer = make(W4A8Config(row_rotation=True))
    before = {k: v.clone() for k, v in layer.state_dict().items() if k != "bias"}
    y = layer(x)
    getattr(layer, move)()
    layer.to("cpu")
    after = layer.state_dict()
    assert all(torch.equal(v, after[k]) and v.dtype == after[k].dtype for k, v in before.items())
    torch.testing.assert_close(layer(x), y, rtol=1e-2, atol=1e-2)  # the bias is rounded


def test_quantising_twice_gives_the_same_and_leaves_the_layer():
    linear = nn.Linear(100, 70)
    before = linear.weight.detach().clone()
    first, second = W4A8Linear.from_linear(linear), W4A8Linear.from_linear(linear)
    assert torch.equal(linear.weight, before)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


def test_a_cast_of_the_codes_is_refused_and_changes_nothing():
    _, x, layer = make(W4A8Config())
    y = layer(x)
    with pytest.raises(TypeError, match="codes cannot be cast"):
        layer.type(torch.float16)
    assert torch.equal(layer(x), y)


def test_a_deep_copy_is_equal_and_independent():
    _, x, layer = make(W4A8Config())
    other, y = copy.deepcopy(layer), layer(x)
    assert torch.equal(other(x), y)
    other.scale.mul_(2)
    assert torch.equal(layer(x), y)


def test_a_float_weight_is_not_loaded_as_codes():
    with pytest.raises(TypeError, match=r"the layer: the checkpoint holds a weight of torch\.float32, wanted codes"):
        W4A8Linear(8, 4).load_state_dict(nn.Linear(8, 4).state_dict(), strict=False)


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_gradients_are_those_of_the_dequantised_weight(config):
    _, x, layer = make(config)
    x = x.requires_grad_()
    dy = torch.randn(40, 70)
    layer(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ layer.dequantize(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.bias.grad, dy.sum(0), rtol=1e-4, atol=1e-4)
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("config", CONFIGS[:4], ids=name)
def test_it_compiles_into_one_graph(config):
    _, x, layer = make(config)
    torch.testing.assert_close(
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x), rtol=1e-5, atol=1e-5
    )


def test_batch_shapes_and_rows_are_independent():
    _, x, layer = make(W4A8Config())
    whole = layer(x)
    torch.testing.assert_close(layer(x.view(2, 20, 100)).view(40, 70), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x[:1]), whole[:1], rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="cannot quantise a Conv1d"):
        W4A8Linear.from_linear(nn.Conv1d(3, 3, 1))
    with pytest.raises(ValueError, match="'static_folded' needs scales of the activations"):
        W4A8Linear.from_linear(nn.Linear(4, 4), W4A8Config(activation="static_folded"))
    with pytest.raises(ValueError, match=r"x has shape \[2, 5\]; the last dimension must be in_features=4"):
        W4A8Linear(4, 4)(torch.randn(2, 5))


def test_the_mse_of_folded_weights_counts_columns_by_their_activations():
    """A column that the activations use little is rounded coarsely, one with large activations finely."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=False)
    config = W4A8Config(activation="static_folded", rotation=None)
    scale = torch.ones(64)
    scale[:32] = 0.1
    layer = W4A8Linear.from_linear(linear, config, LayerCalibration(scale, None, None))
    error = (layer.dequantize() - linear.weight).square().mean(0)
    assert error[:32].mean() > 20 * error[32:].mean()


def test_the_verb_of_the_package_knows_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 70), nn.ReLU(), nn.Linear(70, 3))
    x, layout = torch.randn(40, 100), QuantLayout(include=("0",))
    wanted = model(x)
    report = quantize_(model, W4A8Config(), where=layout)
    assert [e.name for e in report.changed] == ["0"]
    assert isinstance(model[0], W4A8Linear)
    assert 0 < float((model(x) - wanted).detach().norm() / wanted.detach().norm()) < 0.3
    dequantize_(model)
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="'static_folded' needs scales"):
        quantize_(model, W4A8Config(activation="static_folded"))


@torch.no_grad()
def test_a_transformers_model_is_saved_and_loaded(llama, ids, tmp_path):
    model = llama()
    quantize_(model, W4A8Config())
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert sum(isinstance(m, W4A8Linear) for m in loaded.modules()) == 14
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_it_is_made_again_with_its_own_scales(config):
    linear, _, layer = make(config)
    again = copy.deepcopy(layer)
    again.weight = linear.weight
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in layer.state_dict().items())
