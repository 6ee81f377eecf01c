"""Bits: against the formats' definitions, spelled out slowly here, and against torchao and compressed-tensors."""

import contextlib
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from eff_kernels import FP4Codes, fp4_dequantize, fp4_quantize
from eff_quant import FP4Config, FP4Linear, fake_fp4
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

with contextlib.suppress(ImportError), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

with contextlib.suppress(ImportError), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
ROUNDINGS = ("floor", "even", "rceil", "ceil")
# Ties and what is around them, saturation, zeros of both signs
SPECIAL = [0.0, -0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 6.5, 7.0, 7.5, 1.0, 4.0, 1.9999999, 7.9999995]


def unpack(packed):
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def nearest(x, table):
    """The number of the nearest value in a table, by comparing with all of them; of two the even one."""
    distance = np.abs(np.abs(np.asarray(x, dtype=np.float64))[..., None] - table)
    best = distance.argmin(-1)
    above = np.take_along_axis(distance, np.minimum(best + 1, len(table) - 1)[..., None], -1)[..., 0]
    tie = (above == distance.min(-1)) & (best < len(table) - 1)
    return best + (tie & (best % 2 == 1))


def nearest_codes(x):
    return nearest(x, VALUES) | (8 * np.signbit(x))


def exponent_of(amax, rounding):
    """The exponent of a block's scale, from its definition, in exact arithmetic."""
    if amax == 0:
        return -127
    size = Fraction(amax)
    if rounding == "rceil":
        e = -200
        while Fraction(2) ** e * 6 < size:
            e += 1
        return max(-127, min(127, e))
    e = -200
    while Fraction(2) ** (e + 1) <= size:  # 2^e is the power of two below
        e += 1
    mantissa = size / Fraction(2) ** e
    if rounding == "ceil" and mantissa > 1:
        e += 1
    if rounding == "even" and mantissa >= Fraction(7, 4):  # with one bit of mantissa, 1.75 is the tie and goes up
        e += 1
    return max(-127, min(127, e - 2))


def slow_mxfp4(x, rounding):
    scales, codes = [], []
    for block in x.double().reshape(-1, 32).numpy():
        e = exponent_of(np.abs(block).max(), rounding)
        scales.append(e + 127)
        codes.append(nearest_codes(np.ldexp(block, -e)))  # exact: a float32 times a power of two is a float64
    return torch.from_numpy(np.stack(codes)).reshape(x.shape).to(torch.uint8), torch.tensor(scales, dtype=torch.uint8)


E4M3 = [(m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10)) for e in range(16) for m in range(8)][:-1]


def slow_nvfp4(x, global_scale):
    f32 = np.float32
    s_g = f32(global_scale)
    scales, codes = [], []
    with np.errstate(over="ignore"):
        for block in x.float().reshape(-1, 16).numpy():
            wanted = np.clip(np.abs(block).max() / f32(6) / s_g, f32(2.0**-6), f32(448))
            scales.append(int(nearest(wanted, E4M3)))
            inverse = (f32(1) / s_g) / f32(E4M3[scales[-1]])
            codes.append(nearest_codes(np.clip(block * inverse, f32(-6), f32(6))))
    return torch.from_numpy(np.stack(codes)).reshape(x.shape).to(torch.uint8), torch.tensor(scales, dtype=torch.uint8)


def check_mxfp4(x, rounding):
    codes = fp4_quantize(x, "mxfp4", scale_rounding=rounding)
    expected, scales = slow_mxfp4(x, rounding)
    assert torch.equal(codes.scale.flatten(), scales)
    assert torch.equal(unpack(codes.packed), expected)


def special_rows(seed=0, power=0):
    """Rows of ties, each block with another largest magnitude; [17, 64]."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(SPECIAL)
    x = values[torch.randint(len(SPECIAL), (len(SPECIAL), 64), generator=generator)]
    x = x * torch.randint(0, 2, x.shape, generator=generator).mul(2).sub(1)
    x[:, 0] = values
    x[:, 32:] = torch.minimum(x[:, 32:].abs(), values[:, None]) * torch.where(x[:, 32:].signbit(), -1.0, 1.0)
    return x * 2.0**power


def test_the_table_of_codes():
    codes = torch.arange(16, dtype=torch.uint8)
    packed = (codes[::2] | codes[1::2] << 4).reshape(1, 8)
    packed = torch.cat([packed, torch.zeros(1, 8, dtype=torch.uint8)], 1)
    scale = torch.tensor([[127]], dtype=torch.uint8)
    values = fp4_dequantize(FP4Codes(packed, scale, None), "mxfp4")[0, :16]
    assert values.tolist() == [*VALUES, *(-v for v in VALUES)]
    assert values[8].signbit()


@pytest.mark.parametrize(
    ("x", "value"),
    [(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5, 4), (7, 6), (100, 6), (-0.25, -0.0)],
)
def test_ties_and_saturation(x, value):
    row = torch.zeros(1, 32)
    row[0, :2] = torch.tensor([x, 4.0])  # the scale is 1 up to a largest value of 8
    y = fp4_dequantize(fp4_quantize(row, "mxfp4"), "mxfp4") if x < 8 else fake_nvfp4(row)
    assert y[0, 0] == value
    assert y[0, 0].signbit() == torch.tensor(float(value)).signbit()


def fake_nvfp4(row):
    """With a tensor scale so small that block scales end at 448, which makes 6 the largest value."""
    return fake_fp4(row, "nvfp4", global_scale=torch.tensor(1 / 448))


def test_the_worked_block():
    block = [6, -4, 3, 2, 1.5, -1, 0.5, 0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.3]
    values = [6, -4, 3, 2, 1.5, -1, 0.5, 0, 0, 1, 1, 2, 2, 4, 4, -0.5]
    x = torch.tensor([block])
    codes = fp4_quantize(x, "nvfp4", global_scale=torch.tensor(1.0))
    assert codes.scale.view(torch.uint8).tolist() == [[56]]
    assert bytes(codes.packed[0].tolist()).hex(" ") == "e7 45 a3 01 20 42 64 96"
    assert fp4_dequantize(codes, "nvfp4").tolist() == [values]
    codes = fp4_quantize(torch.cat([x / 4, torch.zeros(1, 16)], 1), "mxfp4")
    assert codes.scale.tolist() == [[125]]
    assert bytes(codes.packed[0, :8].tolist()).hex(" ") == "e7 45 a3 01 20 42 64 96"


SCALES = {  # amax: the scale by floor, even, rceil, ceil
    4.0: (1, 1, 1, 1),
    6.0: (1, 1, 1, 2),
    6.5: (1, 1, 2, 2),
    7.0: (1, 2, 2, 2),
    1.74: (0.25, 0.25, 0.5, 0.5),
    1.75: (0.25, 0.5, 0.5, 0.5),
}


@pytest.mark.parametrize("amax", SCALES)
def test_the_table_of_scales(amax):
    x = torch.zeros(1, 32)
    x[0, 7] = -amax
    scales = [2.0 ** (int(fp4_quantize(x, "mxfp4", scale_rounding=r).scale) - 127) for r in ROUNDINGS]
    assert tuple(scales) == SCALES[amax]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_block_that_saturates_under_floor(rounding):
    x = torch.zeros(1, 32)
    x[0, :2] = torch.tensor([7.5, 1.0])
    codes = fp4_quantize(x, "mxfp4", scale_rounding=rounding)
    floor = rounding == "floor"
    assert codes.scale.item() == (127 if floor else 128)
    assert fp4_dequantize(codes, "mxfp4")[0, :2].tolist() == ([6, 1] if floor else [8, 1])


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("power", [0, -3, 40, -100, -127, -140, 120])
def test_mxfp4_by_its_definition_on_ties(rounding, power):
    """Down to where the scale cannot fall any more (2^-127) and the values are subnormal."""
    check_mxfp4(special_rows(power=power), rounding)


@settings(max_examples=40)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32))
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_mxfp4_by_its_definition_on_anything(rounding, values):
    check_mxfp4(torch.tensor([values]), rounding)


@settings(max_examples=40)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=32, max_size=32),
    st.sampled_from([1.0, 0.3, 2.0**-20, 1e-10, 1e10]),
)
def test_nvfp4_by_its_definition_on_anything(values, scale):
    x = torch.tensor([values])
    codes = fp4_quantize(x, "nvfp4", global_scale=torch.tensor(scale))
    expected, scales = slow_nvfp4(x, scale)
    assert torch.equal(codes.scale.flatten().view(torch.uint8), scales)
    assert torch.equal(unpack(codes.packed), expected)


@pytest.mark.parametrize("power", [0, -10, 30])
def test_nvfp4_by_its_definition_on_ties(power):
    x = special_rows(power=power)
    for scale in (2.0**power, 2.0**power / 100, 0.01 * 2.0**power):
        codes = fp4_quantize(x, "nvfp4", global_scale=torch.tensor(scale))
        expected, scales = slow_nvfp4(x, scale)
        assert torch.equal(codes.scale.flatten().view(torch.uint8), scales)
        assert torch.equal(unpack(codes.packed), expected)


def make_inputs():
    """Random and adversarial inputs [rows, 128], in float32 and bfloat16."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 128, generator=generator)
    wild = x * torch.exp(6 * torch.randn(64, 1, generator=generator))
    zeros = x.clone()
    zeros[::3, 32:64] = 0
    rows = torch.cat([special_rows(s, p) for s, p in ((0, 0), (1, -3), (2, 9), (3, -90))])
    special = torch.cat([rows, rows.flip(1)], 1)
    halves = (x * 8).round() / 8 * 3  # many ties
    for name, t in {"normal": x, "wild": wild, "zeros": zeros, "special": special, "halves": halves}.items():
        yield pytest.param(t, id=name)
        yield pytest.param(t.bfloat16(), id=f"{name}-bf16")


INPUTS = list(make_inputs())


@pytest.mark.parametrize("x", INPUTS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_mxfp4_has_the_bits_of_torchao(x, rounding):
    pytest.importorskip("torchao")
    scale, data = to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode[rounding.upper()])
    codes = fp4_quantize(x, "mxfp4", scale_rounding=rounding)
    assert torch.equal(codes.scale, scale.view(torch.uint8))
    assert torch.equal(codes.packed, data)


@pytest.mark.parametrize("x", INPUTS)
def test_nvfp4_has_the_bits_of_torchao(x):
    pytest.importorskip("torchao")
    s_g = per_tensor_amax_to_scale(x.abs().max())
    scale, data = nvfp4_quantize(x, 16, s_g)
    codes = fp4_quantize(x, "nvfp4")
    assert torch.equal(codes.global_scale, s_g)
    assert torch.equal(codes.scale.view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(codes.packed, data)
    scale, data = nvfp4_quantize(x, 16)  # one level of scales
    codes = fp4_quantize(x, "nvfp4", global_scale=torch.tensor(1.0))
    assert torch.equal(codes.scale.view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(codes.packed, data)


def compressed(x, preset):
    """What compressed-tensors makes of a weight."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    global_scale = generate_gparam(x.min(), x.max()) if preset.startswith("NV") else None
    blocks = x.unflatten(-1, (-1, scheme.weights.group_size))
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale)
    state = {"weight": x, "weight_scale": scale}
    if global_scale is not None:
        state["weight_global_scale"] = global_scale
    name = "nvfp4-pack-quantized" if preset.startswith("NV") else "mxfp4-pack-quantized"
    return BaseCompressor.get_value_from_registry(name).compress(state, scheme)


def layer_of(x, config):
    linear = nn.Linear(x.shape[1], x.shape[0], bias=False, dtype=x.dtype)
    linear.weight = nn.Parameter(x)
    return FP4Linear.from_linear(linear, config)


@pytest.mark.parametrize("x", [p for p in INPUTS if "bf16" not in p.id and p.id != "special"])
def test_weights_have_the_bits_of_compressed_tensors(x):
    pytest.importorskip("compressed_tensors")
    theirs = compressed(x, "MXFP4")
    layer = layer_of(x, FP4Config(format="mxfp4", scale_rounding="even"))
    zero = layer.weight_scale == 0  # the scale of a block of zeros is free: theirs is 2^-129 cast to a byte
    assert torch.equal(layer.weight_scale[~zero], theirs["weight_scale"][~zero])
    assert torch.equal(layer.weight_packed & 0x77, theirs["weight_packed"] & 0x77)
    theirs = compressed(x, "NVFP4")
    layer = layer_of(x, FP4Config())
    assert torch.equal(layer.weight_global_scale, theirs["weight_global_scale"])
    ours, scales = (s.view(torch.uint8) for s in (layer.weight_scale, theirs["weight_scale"]))
    low = layer.weight_scale.float() == 2.0**-6  # they let block scales fall below 2^-6, as far as 2^-9
    assert torch.equal(ours[~low], scales[~low])
    differ = unpack(layer.weight_packed) != unpack(theirs["weight_packed"])
    differ &= ~low.repeat_interleave(16, 1) & (x != 0)  # they lose the sign of a zero
    # They divide by the product of the scales where we, as torchao, multiply by its inverse: exact ties may differ.
    size = (x / layer.weight_scale.float().repeat_interleave(16, 1) * layer.weight_global_scale).abs()
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    off = (size[..., None] - ties).abs().amin(-1)
    assert (off[differ] < 1e-6 * size[differ]).all()
    assert differ.float().mean() < (0.1 if (off < 1e-6 * size).any() else 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_unusual_blocks(format, dtype):
    x = torch.randn(6, 64).to(dtype)
    x[0] = 0
    x[1, 32:] = 0
    x[2, :32] = torch.finfo(dtype).tiny / 4  # subnormal
    x[3, 5] = torch.nan
    y = fake_fp4(x, format, global_scale=torch.tensor(0.01) if format == "nvfp4" else None)
    assert y.dtype == dtype
    assert (y[0] == 0).all()
    assert (y[1, 32:] == 0).all()
    assert torch.isfinite(y[:3]).all()
    nan_block = FP4Config(format=format).block
    assert y[3, :nan_block].isnan().all()
    assert torch.isfinite(y[3, nan_block:]).all()
    assert torch.isfinite(y[4:]).all()
    if format == "mxfp4":
        assert (y[2, :32] == x[2, :32]).all()


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_strides_do_not_matter(format):
    x = torch.randn(64, 128)
    expected = fake_fp4(x[:, ::2].contiguous(), format)
    assert torch.equal(fake_fp4(x[:, ::2], format), expected)
    assert torch.equal(fake_fp4(x.T, format), fake_fp4(x.T.contiguous(), format))
    assert (
        torch.equal(fake_fp4(x.reshape(2, 32, 128)[:, :4], format)[1], fake_fp4(x[32:36], format)) or format == "nvfp4"
    )


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.floats(-80, 80), st.sampled_from(ROUNDINGS))
def test_mxfp4_of_its_own_values_changes_nothing_and_powers_shift_the_scale(seed, size, rounding):
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**size
    codes = fp4_quantize(x, "mxfp4", scale_rounding=rounding)
    y = fp4_dequantize(codes, "mxfp4")
    assert torch.equal(fake_fp4(y, "mxfp4", scale_rounding=rounding), y)
    shifted = fp4_quantize(x * 2.0**7, "mxfp4", scale_rounding=rounding)
    assert torch.equal(shifted.packed, codes.packed)
    assert torch.equal(shifted.scale, codes.scale + 7)


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from(ROUNDINGS))
def test_the_error_is_half_a_gap_at_most_inside_the_range(seed, rounding):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
    for format in ("mxfp4", "nvfp4"):
        codes = fp4_quantize(x, format, scale_rounding=rounding if format == "mxfp4" else "floor")
        unit = fp4_dequantize(codes._replace(packed=torch.full_like(codes.packed, 0x22)), format)
        size, error = (x / unit).abs(), (fp4_dequantize(codes, format) - x).abs() / unit
        gap = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
        assert (error <= gap / 2 + 1e-5)[size <= 6].all()
        assert (size <= 6).any(1).all()
