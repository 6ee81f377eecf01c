"""Tensor layouts of other libraries, with torchao itself."""

import contextlib
import warnings

import pytest
import torch
from eff_kernels import FP4Codes, fp4_dequantize, fp4_quantize
from eff_quant.fp4 import from_layout, to_layout
from eff_quant.fp4.layouts import swizzle_scales, unswizzle_scales
from hypothesis import given
from hypothesis import strategies as st

with contextlib.suppress(ImportError), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
    from torchao.prototype.mx_formats.utils import from_blocked, to_blocked

LAYOUTS = [
    ("nvfp4", "compressed-tensors"),
    ("nvfp4", "modelopt"),
    ("nvfp4", "torchao"),
    ("nvfp4", "torchao-swizzled"),
    ("mxfp4", "compressed-tensors"),
    ("mxfp4", "torchao"),
    ("mxfp4", "torchao-swizzled"),
    ("mxfp4", "gpt-oss"),
]


def codes_of(format, n=40, k=96):
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 5
    return fp4_quantize(x, format)


@pytest.mark.parametrize(("format", "layout"), LAYOUTS)
def test_there_and_back(format, layout):
    codes = codes_of(format)
    back = from_layout(to_layout(codes, layout), layout)
    assert torch.equal(back.packed, codes.packed)
    assert torch.equal(back.scale.view(torch.uint8), codes.scale.view(torch.uint8))
    if format == "mxfp4":
        assert back.global_scale is None
    else:
        torch.testing.assert_close(back.global_scale, codes.global_scale, rtol=2**-22, atol=0)
    assert from_layout(to_layout(codes, layout), layout, format=format).packed.shape == codes.packed.shape


@pytest.mark.parametrize(
    ("format", "layout", "kinds"),
    [
        ("nvfp4", "modelopt", {"weight": (40, 48), "weight_scale": (40, 6), "weight_scale_2": ()}),
        ("nvfp4", "torchao", {"qdata": (40, 48), "scale": (40, 6), "per_tensor_scale": ()}),
        ("nvfp4", "torchao-swizzled", {"qdata": (40, 48), "scale": (32, 32), "per_tensor_scale": ()}),
        ("mxfp4", "torchao-swizzled", {"qdata": (40, 48), "scale": (32, 16)}),
        ("mxfp4", "gpt-oss", {"blocks": (40, 3, 16), "scales": (40, 3)}),
        (
            "nvfp4",
            "compressed-tensors",
            {"weight_packed": (40, 48), "weight_scale": (40, 6), "weight_global_scale": (1,)},
        ),
    ],
)
def test_names_and_shapes(format, layout, kinds):
    assert {k: tuple(t.shape) for k, t in to_layout(codes_of(format), layout).items()} == kinds


def test_who_multiplies_and_who_divides():
    codes = codes_of("nvfp4")
    scale = codes.global_scale.item()
    assert scale < 0.1
    assert to_layout(codes, "modelopt")["weight_scale_2"].item() == scale
    assert to_layout(codes, "torchao")["per_tensor_scale"].item() == scale
    divides = to_layout(codes, "compressed-tensors")["weight_global_scale"].item()
    assert divides == pytest.approx(1 / scale, rel=2**-23)


@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("shape", [(40, 96), (128, 128), (130, 224)])
def test_tensors_of_torchao(swizzled, shape):
    pytest.importorskip("torchao")
    layout = "torchao-swizzled" if swizzled else "torchao"
    x = torch.randn(shape) * 3
    scale = per_tensor_amax_to_scale(x.abs().max())
    tensor = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale, is_swizzled_scales=swizzled)
    theirs = {"qdata": tensor.qdata, "scale": tensor.scale, "per_tensor_scale": tensor.per_tensor_scale}
    codes = from_layout(theirs, layout)
    torch.testing.assert_close(fp4_dequantize(codes, "nvfp4"), tensor.dequantize(), rtol=2**-21, atol=0)
    ours = to_layout(codes._replace(global_scale=scale), layout)
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        assert torch.equal(t.flatten().view(torch.uint8), theirs[name].flatten().view(torch.uint8))
    if swizzled:
        assert ours["scale"].shape == tensor.scale.shape
    again = NVFP4Tensor(
        ours["qdata"], ours["scale"], 16, torch.float32, ours["per_tensor_scale"], is_swizzled_scales=swizzled
    )
    assert torch.equal(again.dequantize(), tensor.dequantize())

    tensor = MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32, is_swizzled_scales=swizzled)
    theirs = {"qdata": tensor.qdata, "scale": tensor.scale}
    codes = from_layout(theirs, layout)
    assert torch.equal(fp4_dequantize(codes, "mxfp4"), tensor.dequantize(torch.float32))
    for name, t in to_layout(codes, layout).items():
        assert t.dtype == theirs[name].dtype
        assert torch.equal(t.flatten().view(torch.uint8), theirs[name].flatten().view(torch.uint8))


def test_one_level_nvfp4_of_torchao():
    pytest.importorskip("torchao")
    tensor = NVFP4Tensor.to_nvfp4(torch.randn(16, 64))
    codes = from_layout({"qdata": tensor.qdata, "scale": tensor.scale}, "torchao")
    assert codes.global_scale == 1
    assert torch.equal(fp4_dequantize(codes, "nvfp4"), tensor.dequantize(torch.float32))


@given(st.integers(1, 300), st.integers(1, 20))
def test_swizzling_is_that_of_torchao(rows, columns):
    pytest.importorskip("torchao")
    scale = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    swizzled = swizzle_scales(scale)
    assert torch.equal(swizzled.flatten(), to_blocked(scale))
    assert torch.equal(from_blocked(swizzled, rows, columns), scale)
    assert torch.equal(unswizzle_scales(swizzled, (rows, columns)), scale)


def test_a_swizzled_tile_by_hand():
    """The scale of row r, column c of a tile is number (r % 32) * 16 + (r // 32) * 4 + c."""
    scale = torch.arange(128 * 4).reshape(128, 4).remainder(251).to(torch.uint8)
    swizzled = swizzle_scales(scale).flatten()
    for r, c in [(0, 0), (0, 3), (1, 0), (31, 2), (32, 0), (33, 1), (127, 3)]:
        assert swizzled[(r % 32) * 16 + (r // 32) * 4 + c] == scale[r, c]


def test_experts_of_gpt_oss_keep_their_axis():
    x = torch.randn(3, 8, 64)
    codes = fp4_quantize(x, "mxfp4")
    tensors = to_layout(codes, "gpt-oss")
    assert tensors["blocks"].shape == (3, 8, 2, 16)
    assert tensors["scales"].shape == (3, 8, 2)
    back = from_layout(tensors, "gpt-oss")
    assert torch.equal(fp4_dequantize(back, "mxfp4"), fp4_dequantize(codes, "mxfp4"))
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for e, r, b, i in [(0, 0, 0, 0), (2, 7, 1, 15), (1, 3, 0, 9)]:  # as the file format is defined
        byte = int(tensors["blocks"][e, r, b, i])
        pair = table[[byte & 15, byte >> 4]] * 2.0 ** (int(tensors["scales"][e, r, b]) - 127)
        assert torch.equal(fp4_dequantize(codes, "mxfp4")[e, r, 32 * b + 2 * i : 32 * b + 2 * i + 2], pair)


def drop(name):
    return lambda t: t.pop(name)


def put(**tensors):
    return lambda t: t.update(tensors)


@pytest.mark.parametrize(
    ("format", "layout", "change", "error", "says"),
    [
        ("nvfp4", "modelopt", drop("weight"), KeyError, r"layout 'modelopt' needs .*\['weight'\] missing"),
        ("nvfp4", "modelopt", drop("weight_scale_2"), KeyError, "needs weight_scale_2"),
        ("nvfp4", "compressed-tensors", drop("weight_global_scale"), KeyError, "needs weight_global_scale"),
        ("mxfp4", "gpt-oss", drop("scales"), KeyError, r"\['scales'\] missing"),
        ("mxfp4", "gpt-oss", put(blocks=torch.zeros(40, 48, dtype=torch.uint8)), ValueError, "wanted .*K/32, 16"),
        ("mxfp4", "gpt-oss", put(scales=torch.full((40, 3), 255, dtype=torch.uint8)), ValueError, "block 0 is NaN"),
        ("mxfp4", "torchao", put(scale=torch.zeros(40, 4, dtype=torch.uint8)), ValueError, r"shape \[40, 4\], wanted"),
        ("mxfp4", "torchao-swizzled", put(scale=torch.zeros(40, 4, dtype=torch.uint8)), ValueError, "512 numbers"),
        ("nvfp4", "torchao", put(qdata=torch.zeros(40, 48)), TypeError, r"weight_packed has dtype torch\.float32"),
        ("nvfp4", "torchao", put(per_tensor_scale=torch.ones(3, 1, 1)), ValueError, "convert each expert by itself"),
        ("nvfp4", "modelopt", put(weight_scale_2=torch.tensor(0.0)), ValueError, "weight_global_scale is inf"),
    ],
)
def test_damaged_tensors_are_refused(format, layout, change, error, says):
    tensors = to_layout(codes_of(format), layout)
    change(tensors)
    with pytest.raises(error, match=says):
        from_layout(tensors, layout)


@pytest.mark.parametrize(("format", "layout"), [("mxfp4", "modelopt"), ("nvfp4", "gpt-oss")])
def test_layouts_of_one_format_refuse_the_other(format, layout):
    with pytest.raises(ValueError, match=f"layout '{layout}' holds .*, got {format}"):
        to_layout(codes_of(format), layout)
    names = ("weight", "weight_scale") if layout == "modelopt" else ("blocks", "scales")
    with pytest.raises(ValueError, match=f"layout '{layout}' holds .*, got {format}"):
        from_layout(dict(zip(names, codes_of(format)[:2], strict=True)), layout)


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="layout='gguf'; use one of 'compressed-tensors', 'modelopt'"):
        to_layout(codes_of("nvfp4"), "gguf")
    with pytest.raises(ValueError, match="layout='gguf'"):
        from_layout({}, "gguf")


def test_codes_of_a_layer_convert(llama):
    from eff_quant import FP4Config, FP4Linear

    layer = FP4Linear.from_linear(torch.nn.Linear(64, 8), FP4Config())
    assert isinstance(layer.codes, FP4Codes)
    back = from_layout(to_layout(layer.codes, "modelopt"), "modelopt")
    torch.testing.assert_close(fp4_dequantize(back, "nvfp4"), layer.dequantize(), rtol=2**-22, atol=0)
