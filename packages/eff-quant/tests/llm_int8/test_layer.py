"""The layer as a module: state dict, moves and casts, copies, compile, memory, gradients."""

import copy
import io

import pytest
import torch
from eff_quant import Int8Config, Int8Linear
from eff_quant.llm_int8 import quantize_weight
from torch import nn


@pytest.fixture
def linear():
    return nn.Linear(48, 24)


def test_its_state_dict_is_that_of_bitsandbytes(linear):
    state = Int8Linear.from_linear(linear).state_dict()
    kinds = {name: (t.dtype, tuple(t.shape)) for name, t in state.items()}
    assert kinds == {
        "weight": (torch.int8, (24, 48)),
        "SCB": (torch.float32, (24,)),
        "weight_format": (torch.uint8, ()),
        "bias": (torch.float32, (24,)),
    }
    assert state["weight_format"] == 0


@pytest.mark.parametrize("columns", [(), (1, 30)])
def test_a_state_dict_loads_into_a_fresh_layer(linear, columns):
    config = Int8Config(outlier_weights="original", outlier_columns={"": columns}) if columns else Int8Config()
    full = Int8Linear.from_linear(linear, config, outlier_columns=columns)
    file = io.BytesIO()
    torch.save(full.state_dict(), file)
    file.seek(0)
    fresh = Int8Linear(48, 24, config=config)
    fresh.load_state_dict(torch.load(file))
    x = torch.randn(3, 48) * 5
    assert torch.equal(fresh(x), full(x))


@pytest.mark.parametrize("layout", ["row", torch.tensor(0, dtype=torch.uint8), 0, None])
def test_row_major_layout_loads_however_it_is_written(linear, layout):
    state = Int8Linear.from_linear(linear).state_dict()
    del state["weight_format"]
    if layout is not None:
        state["weight_format"] = layout
    fresh = Int8Linear(48, 24)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.codes, state["weight"])
    assert fresh.weight_format == 0


@pytest.mark.parametrize("layout", ["col32", torch.tensor(2, dtype=torch.uint8), 7])
def test_other_layouts_are_refused(linear, layout):
    model = nn.Sequential(Int8Linear.from_linear(linear))
    state = {**model.state_dict(), "0.weight_format": layout}
    with pytest.raises(ValueError, match=r"0: weight_format=.*only 0 or 'row'"):
        model.load_state_dict(state)


def test_a_weight_without_scales_is_an_error_that_names_the_module(linear):
    model = nn.ModuleDict({"proj": Int8Linear.from_linear(linear)})
    state = model.state_dict()
    del state["proj.SCB"]
    with pytest.raises(KeyError, match=r"proj: int8 weight without its scales proj\.SCB"):
        model.load_state_dict(state, strict=False)


def test_a_float_weight_is_not_quantised_by_loading_it(linear):
    with pytest.raises(TypeError, match=r"dtype torch\.float32, wanted int8"):
        Int8Linear(48, 24).load_state_dict(linear.state_dict(), strict=False)


@pytest.mark.parametrize("move", ["half", "bfloat16", "double", "float", "cpu"])
def test_casting_and_moving_leave_codes_and_scales_alone(linear, move):
    int8 = Int8Linear.from_linear(linear)
    before = {k: v.clone() for k, v in int8.state_dict().items()}
    getattr(int8, move)()
    int8.to("cpu")
    assert int8.codes.dtype == torch.int8
    assert int8.SCB.dtype == torch.float32
    assert all(torch.equal(before[k], int8.state_dict()[k]) for k in ("weight", "SCB", "weight_format"))
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}.get(move, torch.float32)
    assert int8.bias.dtype == dtype
    assert int8(torch.randn(2, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_to_takes_dtype_and_device_at_once(linear):
    int8 = Int8Linear.from_linear(linear)
    scales = int8.SCB.clone()
    int8.to("cpu", torch.bfloat16)
    assert torch.equal(int8.SCB, scales)
    assert Int8Linear(48, 24, device="meta").to_empty(device="cpu").SCB.dtype == torch.float32


def test_a_cast_of_the_codes_is_refused_and_changes_nothing(linear):
    int8 = Int8Linear.from_linear(linear)
    before = copy.deepcopy(int8.state_dict())
    with pytest.raises(TypeError, match="codes cannot be cast"):
        int8.type(torch.float16)
    assert all(torch.equal(v, int8.state_dict()[k]) for k, v in before.items())


def test_a_deep_copy_is_equal_and_independent(linear):
    int8 = Int8Linear.from_linear(linear)
    other = copy.deepcopy(int8)
    x = torch.randn(2, 48)
    y = int8(x)
    assert torch.equal(other(x), y)
    other.SCB.mul_(2)
    assert torch.equal(int8(x), y)


def test_training_mode_gives_the_same_output(linear):
    int8 = Int8Linear.from_linear(linear, Int8Config(threshold=2.0))
    x = torch.randn(4, 48)
    assert torch.equal(int8.train()(x), int8.eval()(x))


@pytest.mark.parametrize("bias", [True, False])
def test_memory_is_half_of_bfloat16(bias):
    linear = nn.Linear(1024, 512, bias=bias, dtype=torch.bfloat16)
    int8 = Int8Linear.from_linear(linear)
    size = sum(t.nbytes for t in (*int8.parameters(), *int8.buffers()))
    before = sum(p.nbytes for p in linear.parameters())
    assert size == 512 * 1024 + 4 * 512 + 1 + (2 * 512 if bias else 0)
    assert size <= 0.51 * before


def test_dequantised_weights_are_within_half_a_step(linear):
    int8 = Int8Linear.from_linear(linear)
    step = linear.weight.detach().abs().amax(1, keepdim=True) / 127
    # and float16's own rounding, 2**-11 of a value
    assert ((int8.dequantize() - linear.weight).abs() <= step * (0.5 + 127 * 2**-11)).all()
    back = int8.to_linear()
    assert torch.equal(back.weight, int8.dequantize())
    assert back.bias is int8.bias


def test_quantising_the_dequantised_weight_gives_the_same_bytes(linear):
    int8 = Int8Linear.from_linear(linear)
    again = Int8Linear.from_linear(int8.to_linear())
    assert torch.equal(again.codes, int8.codes)
    torch.testing.assert_close(again.SCB, int8.SCB, rtol=2**-11, atol=0)


@pytest.mark.parametrize("scale", [1e6, 1e-6])
def test_rows_beyond_float16_keep_their_values(scale):
    weight = torch.randn(6, 32)
    weight[2] *= scale
    codes, absmax = quantize_weight(weight.to(torch.bfloat16))
    plain, _ = quantize_weight(torch.randn(6, 32))
    assert plain.dtype == torch.int8
    back = codes * absmax[:, None] / 127
    torch.testing.assert_close(back[2], weight[2], rtol=0, atol=float(weight[2].abs().max()) / 127)


def test_blocks_of_rows_change_nothing(monkeypatch):
    weight = torch.randn(37, 16)
    whole = quantize_weight(weight)
    monkeypatch.setattr("eff_quant.llm_int8.weight.BLOCK", 64)
    parts = quantize_weight(weight)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.absmax, parts.absmax)


def test_infinite_weights_are_refused_with_their_row():
    weight = torch.randn(5, 8)
    weight[3, 2] = float("inf")
    with pytest.raises(ValueError, match="weight row 3 holds inf or NaN"):
        quantize_weight(weight)


@pytest.mark.parametrize("module", [nn.Conv1d(3, 3, 1), nn.Embedding(3, 3)])
def test_other_modules_are_refused(module):
    with pytest.raises(TypeError, match=f"cannot quantise a {type(module).__name__}"):
        Int8Linear.from_linear(module)


def test_inputs_that_do_not_fit_are_refused(linear):
    int8 = Int8Linear.from_linear(linear)
    with pytest.raises(ValueError, match="do not fit"):
        int8(torch.randn(2, 47))
    with pytest.raises(TypeError):
        int8(torch.ones(2, 48, dtype=torch.int64))
    with pytest.raises(ValueError, match="outlier column 48 is not in a layer of in_features=48"):
        Int8Linear.from_linear(linear, outlier_columns=(48,))


@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (2, 1, 3, 48)])
@pytest.mark.parametrize("settings", [{"threshold": 0.0}, {"threshold": 1.5}, {"activation": "none"}])
def test_gradients_are_those_of_the_dequantised_weight(linear, shape, settings):
    int8 = Int8Linear.from_linear(linear, Int8Config(**settings))
    x = torch.randn(shape, requires_grad=True)
    dy = torch.randn(*shape[:-1], 24)
    int8(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ int8.dequantize(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(int8.bias.grad, dy.reshape(-1, 24).sum(0), rtol=1e-5, atol=1e-5)
    assert not int8.codes.requires_grad
    assert not int8.weight.requires_grad


def test_gradients_with_static_columns_use_their_weights(linear):
    columns = (0, 7)
    config = Int8Config(threshold=0, outlier_weights="original", outlier_columns={"": columns})
    int8 = Int8Linear.from_linear(linear, config, outlier_columns=columns)
    x = torch.randn(3, 48, requires_grad=True)
    int8(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 24) @ int8.dequantize(), rtol=1e-5, atol=1e-5)
    assert torch.equal(int8.dequantize()[:, 7], linear.weight[:, 7])


@pytest.mark.parametrize("settings", [{"threshold": 0.0}, {"activation": "none"}])
def test_it_compiles_into_one_graph(linear, settings):
    int8 = Int8Linear.from_linear(linear, Int8Config(**settings))
    compiled = torch.compile(int8, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 48, requires_grad=True)
    y = compiled(x)
    assert torch.equal(y, int8(x))
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 24) @ int8.dequantize(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("static", [False, True])
def test_with_outliers_it_breaks_the_graph_at_most_once(linear, static):
    columns = (5,) if static else ()
    config = Int8Config(outlier_weights="original", outlier_columns={"": columns}) if static else Int8Config()
    int8 = Int8Linear.from_linear(linear, config, outlier_columns=columns)
    x = torch.randn(3, 48) * 4
    explained = torch._dynamo.explain(int8)(x)
    assert explained.graph_break_count <= 1
    assert torch.equal(torch.compile(int8, backend="aot_eager")(x), int8(x))
