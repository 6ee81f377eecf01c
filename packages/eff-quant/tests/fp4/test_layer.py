"""The layer as a module: state dict, moves and casts, copies, compile, memory, gradients."""

import copy
import io

import pytest
import torch
from eff_quant import FP4Config, FP4Linear
from eff_quant.fp4.weight import largest_magnitude, quantize_weight, reciprocal_scale, shared_reciprocal_scale
from torch import nn

FORMATS = ("nvfp4", "mxfp4")
CONFIGS = [
    FP4Config(),
    FP4Config(format="mxfp4"),
    FP4Config(activations="dynamic"),
    FP4Config(activations="static"),
    FP4Config(format="mxfp4", activations="dynamic", scale_rounding="even"),
]


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(64, 24)


def make(linear, config):
    layer = FP4Linear.from_linear(linear, config)
    if config.activations == "static":
        layer.input_global_scale = torch.tensor([2688 / 4.0])
    return layer


def same_bytes(a, b):
    return all(torch.equal(t.view(torch.uint8), b[n].view(torch.uint8)) for n, t in a.items() if n != "bias")


@pytest.mark.parametrize("format", FORMATS)
def test_its_state_dict_is_that_of_compressed_tensors(linear, format):
    state = FP4Linear.from_linear(linear, FP4Config(format=format)).state_dict()
    kinds = {name: (t.dtype, tuple(t.shape)) for name, t in state.items()}
    nvfp4 = {"weight_scale": (torch.float8_e4m3fn, (24, 4)), "weight_global_scale": (torch.float32, (1,))}
    assert kinds == {
        "weight_packed": (torch.uint8, (24, 32)),
        "bias": (torch.float32, (24,)),
        **(nvfp4 if format == "nvfp4" else {"weight_scale": (torch.uint8, (24, 2))}),
    }


def test_static_activations_add_their_scale(linear):
    state = FP4Linear.from_linear(linear, FP4Config(activations="static")).state_dict()
    assert state["input_global_scale"].dtype == torch.float32
    assert tuple(state["input_global_scale"].shape) == (1,)


def test_the_tensor_scale_is_stored_as_a_reciprocal(linear):
    with torch.no_grad():
        linear.weight[3, 5] = -7.0
    layer = FP4Linear.from_linear(linear)
    assert layer.weight_global_scale.item() == pytest.approx(2688 / 7, rel=2**-23)
    assert layer.codes.global_scale * layer.weight_global_scale == pytest.approx(1, rel=2**-23)
    assert layer.dequantize()[3, 5] == pytest.approx(-7, rel=2**-22)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_state_dict_loads_into_a_fresh_layer(linear, config):
    full = make(linear, config)
    file = io.BytesIO()
    torch.save(full.state_dict(), file)
    file.seek(0)
    fresh = FP4Linear(64, 24, config=config)
    fresh.load_state_dict(torch.load(file))
    x = torch.randn(3, 64) * 5
    assert torch.equal(fresh(x), full(x))


def change(state, name, **changes):
    for leaf, value in changes.items():
        if value is None:
            del state[f"{name}.{leaf}"]
        else:
            state[f"{name}.{leaf}"] = value(state[f"{name}.{leaf}"])
    return state


def set_(value, *at):
    def edit(t):
        t = t.clone()
        t.view(torch.uint8 if t.element_size() == 1 else t.dtype)[at or ...] = value
        return t

    return edit


@pytest.mark.parametrize(
    ("format", "edit", "error", "says"),
    [
        ("nvfp4", {"weight_scale": None}, KeyError, "proj: weight_packed without weight_scale, which nvfp4 needs"),
        ("nvfp4", {"weight_global_scale": None}, KeyError, "proj: weight_packed without weight_global_scale"),
        ("mxfp4", {"weight_scale": None}, KeyError, "proj: weight_packed without weight_scale, which mxfp4 needs"),
        ("nvfp4", {"weight_packed": lambda t: t.int()}, TypeError, "proj: weight_packed has dtype torch.int32"),
        ("nvfp4", {"weight_scale": lambda t: t.float()}, TypeError, "weight_scale has dtype torch.float32, wanted"),
        ("mxfp4", {"weight_scale": lambda t: t.float()}, TypeError, "wanted torch.uint8 for mxfp4"),
        ("nvfp4", {"weight_scale": lambda t: t[:, :3]}, ValueError, r"has shape \[24, 3\], wanted \[24, 4\]"),
        ("nvfp4", {"weight_packed": lambda t: t[:20]}, ValueError, r"has shape \[20, 32\], wanted \[24, 32\]"),
        ("nvfp4", {"weight_global_scale": lambda t: t.repeat(2)}, ValueError, r"has shape \[2\], wanted \[1\]"),
        ("nvfp4", {"weight_global_scale": set_(0.0)}, ValueError, "weight_global_scale is 0.0, wanted a finite"),
        ("nvfp4", {"weight_global_scale": set_(float("nan"))}, ValueError, "weight_global_scale is nan"),
        ("nvfp4", {"weight_scale": set_(0xFF, 5, 2)}, ValueError, "proj: weight_scale of row 5, block 2 is NaN"),
        ("mxfp4", {"weight_scale": set_(255, 7, 1)}, ValueError, "proj: weight_scale of row 7, block 1 is NaN"),
    ],
)
def test_a_damaged_state_dict_is_an_error_that_names_the_module(linear, format, edit, error, says):
    model = nn.ModuleDict({"proj": FP4Linear.from_linear(linear, FP4Config(format=format))})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=says):
        model.load_state_dict(change(dict(model.state_dict()), "proj", **edit), strict=False)
    assert same_bytes(before, model.state_dict())


def test_files_of_the_other_format_do_not_load(linear):
    state = FP4Linear.from_linear(linear, FP4Config(format="mxfp4")).state_dict()
    with pytest.raises(TypeError, match=r"weight_scale has dtype torch\.uint8, wanted torch\.float8_e4m3fn for nvfp4"):
        FP4Linear(64, 24).load_state_dict(state)


def test_a_float_weight_is_not_quantised_by_loading_it(linear):
    with pytest.raises(TypeError, match="the checkpoint holds a float weight, wanted FP4"):
        FP4Linear(64, 24).load_state_dict(linear.state_dict(), strict=False)


def test_scalars_and_e8m0_scales_load_as_well(linear):
    layer = FP4Linear.from_linear(linear)
    state = layer.state_dict()
    state["weight_global_scale"] = state["weight_global_scale"].reshape(())
    fresh = FP4Linear(64, 24)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.dequantize(), layer.dequantize())
    layer = FP4Linear.from_linear(linear, FP4Config(format="mxfp4"))
    state = layer.state_dict()
    state["weight_scale"] = state["weight_scale"].view(torch.float8_e8m0fnu)
    fresh = FP4Linear(64, 24, config=layer.config)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.dequantize(), layer.dequantize())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("move", ["half", "bfloat16", "double", "float", "cpu"])
def test_casting_and_moving_leave_codes_and_scales_alone(linear, config, move):
    layer = make(linear, config)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    getattr(layer, move)()
    layer.to("cpu")
    after = layer.state_dict()
    assert {n: t.dtype for n, t in before.items() if n != "bias"} == {
        n: t.dtype for n, t in after.items() if n != "bias"
    }
    assert same_bytes(before, after)
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}.get(move, torch.float32)
    assert (layer.bias.dtype, layer.weight.dtype) == (dtype, dtype)
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_to_takes_dtype_and_device_at_once(linear):
    layer = FP4Linear.from_linear(linear)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.to("cpu", torch.bfloat16)
    assert same_bytes(before, layer.state_dict())
    empty = FP4Linear(64, 24, device="meta").to_empty(device="cpu")
    assert empty.weight_scale.dtype == torch.float8_e4m3fn


def test_a_cast_of_the_codes_is_refused_and_changes_nothing(linear):
    layer = FP4Linear.from_linear(linear)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(TypeError, match="codes cannot be cast"):
        layer.type(torch.float16)
    assert same_bytes(before, layer.state_dict())


def test_a_deep_copy_is_equal_and_independent(linear):
    layer = FP4Linear.from_linear(linear)
    other = copy.deepcopy(layer)
    x = torch.randn(2, 64)
    y = layer(x)
    assert torch.equal(other(x), y)
    other.weight_packed.zero_()
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("config", CONFIGS)
def test_training_mode_gives_the_same_output(linear, config):
    layer = make(linear, config)
    x = torch.randn(4, 64)
    assert torch.equal(layer.train()(x), layer.eval()(x))


@pytest.mark.parametrize(("format", "bits"), [("nvfp4", 4.5), ("mxfp4", 4.25)])
def test_memory_is_what_the_format_says(format, bits):
    linear = nn.Linear(1024, 512, dtype=torch.bfloat16)
    layer = FP4Linear.from_linear(linear, FP4Config(format=format))
    size = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
    assert size == 512 * 1024 * bits / 8 + 2 * 512 + (4 if format == "nvfp4" else 0)


@pytest.mark.parametrize("format", FORMATS)
def test_dequantised_weights_are_within_half_a_gap(linear, format):
    layer = FP4Linear.from_linear(linear, FP4Config(format=format))
    block = layer.config.block
    scales = layer.weight_scale
    step = scales.float() * layer.codes.global_scale if format == "nvfp4" else 2.0 ** (scales.float() - 127)
    step = step.repeat_interleave(block, 1)
    error, size = (layer.dequantize() - linear.weight).abs(), linear.weight.abs() / step
    half_gap = torch.where(size < 2, 0.25, torch.where(size < 4, 0.5, 1.0))
    inside = size <= 6
    assert inside.float().mean() > 0.7
    assert (error / step <= half_gap * (1 + 1e-5))[inside].all()
    back = layer.to_linear()
    assert torch.equal(back.weight, layer.dequantize())
    assert back.bias is layer.bias


@pytest.mark.parametrize("format", FORMATS)
def test_quantising_the_dequantised_weight_gives_the_same_values(linear, format):
    layer = FP4Linear.from_linear(linear, FP4Config(format=format))
    again = FP4Linear.from_linear(layer.to_linear(), layer.config, reciprocal=layer.weight_global_scale)
    assert torch.equal(again.dequantize(), layer.dequantize())


def test_pieces_of_rows_change_nothing(monkeypatch):
    weight = torch.randn(37, 64)
    whole = [quantize_weight(weight, FP4Config(format=f)) for f in FORMATS]
    monkeypatch.setattr("eff_quant.fp4.weight.PIECE", 130)
    parts = [quantize_weight(weight, FP4Config(format=f)) for f in FORMATS]
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a.packed, b.packed)
        assert torch.equal(a.scale.view(torch.uint8), b.scale.view(torch.uint8))
        assert a.reciprocal is b.reciprocal is None or torch.equal(a.reciprocal, b.reciprocal)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("piece", [64, 2**20])
def test_infinite_weights_are_refused_with_their_row(bad, format, piece, monkeypatch):
    monkeypatch.setattr("eff_quant.fp4.weight.PIECE", piece)
    weight = torch.randn(5, 32)
    weight[3, 2] = bad
    with pytest.raises(ValueError, match="weight row 3 holds inf or NaN"):
        quantize_weight(weight, FP4Config(format=format))
    with pytest.raises(ValueError, match="weight row 3 holds inf or NaN"):
        shared_reciprocal_scale([torch.randn(2, 32), weight])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("format", FORMATS)
def test_weights_are_quantised_from_their_float32_values(linear, dtype, format):
    config = FP4Config(format=format)
    weight = linear.weight.detach().to(dtype)
    new, expected = quantize_weight(weight, config), quantize_weight(weight.float(), config)
    assert torch.equal(new.packed, expected.packed)
    assert torch.equal(new.scale.view(torch.uint8), expected.scale.view(torch.uint8))


@pytest.mark.parametrize("format", FORMATS)
def test_transposed_and_strided_weights_are_quantised_as_their_copies(format):
    config = FP4Config(format=format)
    for weight in (torch.randn(64, 24).T, torch.randn(24, 128)[:, ::2], torch.randn(2, 24, 64)[1]):
        new, expected = quantize_weight(weight, config), quantize_weight(weight.contiguous(), config)
        assert torch.equal(new.packed, expected.packed)


def test_a_group_shares_the_scale_of_its_largest_weight():
    weights = [torch.randn(8, 32) * size for size in (1, 5, 2)]
    shared = shared_reciprocal_scale(weights)
    assert torch.equal(shared, reciprocal_scale(largest_magnitude(weights[1])))
    layers = []
    for weight in weights:
        linear = nn.Linear(32, 8, bias=False)
        linear.weight = nn.Parameter(weight)
        layers.append(FP4Linear.from_linear(linear, reciprocal=shared))
    assert all(torch.equal(layer.weight_global_scale, shared) for layer in layers)
    for layer, weight in zip(layers, weights, strict=True):
        assert (layer.dequantize() - weight).pow(2).mean() < 0.02 * weight.pow(2).mean()


@pytest.mark.parametrize("size", [0.0, 1e-32, 1e-20, 1e20, 3e38])
def test_extreme_weights_keep_their_size(size):
    weight = torch.randn(8, 32).clamp(-1, 1) * size
    linear = nn.Linear(32, 8)
    linear.weight = nn.Parameter(weight)
    back = FP4Linear.from_linear(linear).dequantize().double()
    assert torch.isfinite(back).all()
    assert ((back - weight.double()) ** 2).mean() <= 0.02 * (weight.double() ** 2).mean()


def test_weights_near_the_end_of_float32_stay_finite():
    linear = nn.Linear(32, 8)
    linear.weight = nn.Parameter(torch.randn(8, 32) * 1e-39)
    layer = FP4Linear.from_linear(linear)
    assert layer.weight_global_scale == 2.0**120
    assert torch.isfinite(layer(torch.randn(2, 32))).all()


@pytest.mark.parametrize("module", [nn.Conv1d(3, 3, 1), nn.Embedding(3, 3)])
def test_other_modules_are_refused(module):
    with pytest.raises(TypeError, match=f"cannot quantise a {type(module).__name__}"):
        FP4Linear.from_linear(module)


@pytest.mark.parametrize(("format", "block"), [("nvfp4", 16), ("mxfp4", 32)])
def test_a_width_that_is_no_multiple_of_the_block_is_refused(format, block):
    says = f"in_features=40 is not a multiple of {block}, the block of {format}"
    with pytest.raises(ValueError, match=says):
        FP4Linear.from_linear(nn.Linear(40, 8), FP4Config(format=format))
    with pytest.raises(ValueError, match=says):
        quantize_weight(torch.randn(8, 40), FP4Config(format=format))


def test_weights_that_are_none_are_refused():
    with pytest.raises(TypeError, match=r"weight has dtype torch\.int64"):
        quantize_weight(torch.ones(2, 32, dtype=torch.int64), FP4Config())
    with pytest.raises(ValueError, match=r"weight has shape \[2, 2, 32\]"):
        quantize_weight(torch.randn(2, 2, 32), FP4Config())


def test_a_conv1d_of_gpt2_is_transposed():
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(24, 64)
    layer = FP4Linear.from_linear(conv)
    linear = nn.Linear(64, 24)
    linear.weight = nn.Parameter(conv.weight.T.contiguous())
    assert torch.equal(layer.weight_packed, FP4Linear.from_linear(linear).weight_packed)
    assert layer.transposed


def test_static_activations_need_calibration(linear):
    layer = FP4Linear.from_linear(linear, FP4Config(activations="static"))
    x = torch.randn(2, 64)
    with pytest.raises(RuntimeError, match=r"in_features=64.*has no scale for its input yet; use calibrate_fp4"):
        layer(x)
    layer.input_global_scale = torch.tensor([2688 / x.abs().max()])
    expected = FP4Linear.from_linear(linear, FP4Config(activations="dynamic"))(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    layer.input_global_scale = torch.tensor([2688 / 0.5])  # inputs beyond 0.5 are cut off
    assert (layer(x) - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (2, 1, 3, 64)])
@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_are_those_of_the_dequantised_weight(linear, shape, config):
    layer = make(linear, config)
    x = torch.randn(shape, requires_grad=True)
    dy = torch.randn(*shape[:-1], 24)
    layer(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ layer.dequantize(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, dy.reshape(-1, 24).sum(0), rtol=1e-5, atol=1e-5)
    assert not any(b.requires_grad for b in layer.buffers())


@pytest.mark.parametrize("config", CONFIGS)
def test_it_compiles_into_one_graph(linear, config):
    layer = make(linear, config)
    x = torch.randn(3, 64, requires_grad=True)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, layer(x))
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 24) @ layer.dequantize(), rtol=1e-5, atol=1e-5)


def test_a_layer_computes_with_the_weight_that_it_shows(linear):
    for config in CONFIGS[:2]:
        layer = FP4Linear.from_linear(linear, config)
        x = torch.randn(5, 64)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
