"""The layer as a module: state dict, moves and casts, memory, gradients, and quantize_ with it."""

import copy
import io
import json

import pytest
import torch
from eff_kernels import fp8_quantize
from eff_quant import FP8Config, FP8Linear, dequantize_, quantize_
from torch import nn

DYNAMIC = FP8Config(activations="dynamic")


@pytest.fixture
def linear():
    return nn.Linear(48, 24)


def test_its_state_dict_is_that_of_compressed_tensors(linear):
    state = FP8Linear.from_linear(linear).state_dict()
    kinds = {name: (t.dtype, tuple(t.shape)) for name, t in state.items()}
    assert kinds == {
        "weight": (torch.float8_e4m3fn, (24, 48)),
        "weight_scale": (torch.float32, (24, 1)),
        "bias": (torch.float32, (24,)),
    }


@pytest.mark.parametrize("config", [FP8Config(), DYNAMIC, FP8Config(dtype="e5m2", power_of_two=True)])
def test_a_state_dict_loads_into_a_fresh_layer(linear, config):
    full = FP8Linear.from_linear(linear, config)
    file = io.BytesIO()
    torch.save(full.state_dict(), file)
    file.seek(0)
    fresh = FP8Linear(48, 24, config=config)
    fresh.load_state_dict(torch.load(file))
    x = torch.randn(3, 48)
    assert torch.equal(fresh(x), full(x))


def test_output_is_near_that_of_the_float_layer(linear):
    x = torch.randn(200, 48)
    y = linear(x)
    for config, most in ((FP8Config(), 0.04), (DYNAMIC, 0.06), (FP8Config(dtype="e5m2"), 0.08)):
        error = ((FP8Linear.from_linear(linear, config)(x) - y).norm() / y.norm()).item()
        assert most / 4 < error < most


@pytest.mark.parametrize("shape", [(), (1,), (24,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_shapes_and_dtypes_are_read(linear, shape, dtype):
    state = FP8Linear.from_linear(linear).state_dict()
    state["weight_scale"] = torch.full(shape, 0.25, dtype=dtype)
    fresh = FP8Linear(48, 24)
    fresh.load_state_dict(state)
    assert fresh.weight_scale.dtype == torch.float32
    assert torch.equal(fresh.weight_scale, torch.full((24, 1), 0.25))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"proj.weight": torch.zeros(24, 48)}, TypeError, r"proj: weight has dtype torch\.float32, wanted .*e4m3fn"),
        ({"proj.weight_scale": None}, KeyError, "proj: FP8 weight without its scales"),
        ({"proj.weight_scale": torch.ones(24, 2)}, ValueError, r"proj: weight_scale has shape \[24, 2\]"),
        ({"proj.weight": torch.zeros(24, 40).to(torch.float8_e4m3fn)}, ValueError, r"proj: weight.*\[24, 40\]"),
    ],
)
def test_state_dicts_that_do_not_fit_name_the_module(linear, change, error, message):
    model = nn.ModuleDict({"proj": FP8Linear.from_linear(linear)})
    state = {k: v for k, v in {**model.state_dict(), **change}.items() if v is not None}
    with pytest.raises(error, match=message):
        model.load_state_dict(state)


@pytest.mark.parametrize("move", ["half", "bfloat16", "double", "float", "cpu"])
def test_casting_and_moving_leave_codes_and_scales_alone(linear, move):
    fp8 = FP8Linear.from_linear(linear)
    before = {k: v.clone() for k, v in fp8.state_dict().items()}
    getattr(fp8, move)()
    fp8.to("cpu")
    for leaf in ("weight", "weight_scale"):
        assert fp8.state_dict()[leaf].dtype == before[leaf].dtype
        assert torch.equal(fp8.state_dict()[leaf].view(torch.uint8), before[leaf].view(torch.uint8))
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}.get(move, torch.float32)
    assert fp8.bias.dtype == dtype
    assert fp8(torch.randn(2, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_to_takes_dtype_and_device_at_once(linear):
    fp8 = FP8Linear.from_linear(linear)
    scale = fp8.weight_scale.clone()
    fp8.to("cpu", torch.bfloat16)
    assert torch.equal(fp8.weight_scale, scale)
    assert FP8Linear(48, 24, device="meta").to_empty(device="cpu").codes.dtype == torch.float8_e4m3fn


def test_a_cast_of_the_codes_is_refused_and_changes_nothing(linear):
    fp8 = FP8Linear.from_linear(linear)
    before = copy.deepcopy(fp8.state_dict())
    with pytest.raises(TypeError, match="codes cannot be cast"):
        fp8.type(torch.float16)
    assert all(v.dtype == fp8.state_dict()[k].dtype for k, v in before.items())
    assert torch.equal(fp8.weight_scale, before["weight_scale"])


@pytest.mark.parametrize("bias", [True, False])
def test_memory_is_half_of_bfloat16(bias):
    linear = nn.Linear(1024, 512, bias=bias, dtype=torch.bfloat16)
    fp8 = FP8Linear.from_linear(linear)
    size = sum(t.nbytes for t in (*fp8.parameters(), *fp8.buffers()))
    assert size == 512 * 1024 + 4 * 512 + (2 * 512 if bias else 0)


def test_blocks_of_rows_change_nothing(linear, monkeypatch):
    whole = FP8Linear.quantized_tensors(linear.weight, FP8Config())
    monkeypatch.setattr("eff_quant.fp8_qat.layer._BLOCK", 100)
    parts = FP8Linear.quantized_tensors(linear.weight, FP8Config())
    assert torch.equal(whole["codes"].view(torch.uint8), parts["codes"].view(torch.uint8))
    assert torch.equal(whole["weight_scale"], parts["weight_scale"])


def test_dequantised_and_quantised_again_it_has_the_same_bytes(linear):
    fp8 = FP8Linear.from_linear(linear)
    back = fp8.to_linear()
    assert torch.equal(back.weight, fp8.dequantize())
    assert back.bias is fp8.bias
    again = FP8Linear.from_linear(back)
    assert torch.equal(again.codes.view(torch.uint8), fp8.codes.view(torch.uint8))


def test_infinite_weights_are_refused_with_their_row(linear):
    with torch.no_grad():
        linear.weight[3, 2] = float("inf")
    with pytest.raises(ValueError, match="weight row 3 holds inf or NaN"):
        FP8Linear.from_linear(linear)


@pytest.mark.parametrize("module", [nn.Conv1d(3, 3, 1), nn.Embedding(3, 3)])
def test_other_modules_are_refused(module):
    with pytest.raises(TypeError, match=f"cannot quantise a {type(module).__name__}"):
        FP8Linear.from_linear(module)


@pytest.mark.parametrize("config", [FP8Config(), DYNAMIC])
def test_gradients_are_those_of_the_dequantised_weight(linear, config):
    fp8 = FP8Linear.from_linear(linear, config)
    x, dy = torch.randn(2, 3, 48, requires_grad=True), torch.randn(2, 3, 24)
    fp8(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ fp8.dequantize(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fp8.bias.grad, dy.sum((0, 1)), rtol=1e-5, atol=1e-5)
    assert not fp8.weight.requires_grad


def test_it_compiles_into_one_graph(linear):
    fp8 = FP8Linear.from_linear(linear, DYNAMIC)
    compiled = torch.compile(fp8, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 48, requires_grad=True)
    assert torch.equal(compiled(x), fp8(x))


def test_quantize_and_back():
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 8))
    codes = fp8_quantize(model[0].weight.detach())
    report = quantize_(model, FP8Config(skip=("2",)))
    assert [e.name for e in report.changed] == ["0"]
    assert torch.equal(model[0].codes.view(torch.uint8), codes.codes.view(torch.uint8))
    assert type(model[2]) is nn.Linear
    dequantize_(model)
    torch.testing.assert_close(model[0].weight, codes.codes.float() * codes.scale[:, None], rtol=0, atol=0)


def test_settings_travel_as_json():
    config = FP8Config(activations="dynamic", dtype="e5m2", skip=("a",), out_dtype=torch.bfloat16)
    values = json.loads(json.dumps(config.to_dict()))
    assert FP8Config.from_dict(values) == config
    assert values["quant_method"] == "eff_fp8"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"activations": "static"}, ValueError, "activations='static'; use one of 'none', 'dynamic'"),
        ({"dtype": "e3m4"}, ValueError, "dtype='e3m4'"),
        ({"backend": "cuda"}, ValueError, "backend='cuda'"),
        ({"skip": "lm_head"}, TypeError, "one string"),
        ({"out_dtype": torch.int8}, TypeError, "floating"),
    ],
)
def test_settings_out_of_range_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        FP8Config(**settings)


def test_storage_is_that_of_torchao(linear):
    torchao = pytest.importorskip("torchao.quantization")
    theirs = nn.Sequential(nn.Linear(256, 32, bias=False, dtype=torch.bfloat16))
    weight = theirs[0].weight.detach().clone()
    torchao.quantize_(theirs, torchao.Float8WeightOnlyConfig())
    ours = FP8Linear.quantized_tensors(weight.float(), FP8Config())
    stored = theirs[0].weight
    # its scale is rounded to bfloat16, the dtype of the weight, so that codes may differ by a step
    assert stored.qdata.shape == ours["codes"].shape
    assert stored.scale.shape == ours["weight_scale"].shape
    torch.testing.assert_close(stored.scale.float(), ours["weight_scale"], rtol=2**-8, atol=0)
    mine = ours["codes"].float() * ours["weight_scale"]
    torch.testing.assert_close(stored.qdata.float() * stored.scale.float(), mine, rtol=2**-3, atol=1e-4)
