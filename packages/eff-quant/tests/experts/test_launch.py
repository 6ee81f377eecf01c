"""All experts in one launch: the values, gradients and refusals of one expert after the other."""

import dataclasses

import pytest
import torch
from eff_kernels.op import triton_interprets
from eff_kernels.testing.aot import assert_compiles
from eff_quant import FP4Config, FP8Config, Int8Config
from eff_quant.experts import QuantizedExperts, launch
from eff_quant.experts import module as module_file
from eff_quant.experts.route import grouped, route

pytest.importorskip("triton")
DEVICE = "cpu" if triton_interprets() else "cuda"


def on_device(test):
    """Runs under the interpreter, and natively where there is a GPU."""
    if triton_interprets():
        return test
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


FORMATS = {
    "int8": Int8Config(activation="none"),
    "int8 rounded": Int8Config(threshold=0.0, activation_group=None),
    "int8 groups": Int8Config(activation_group=32),
    "int8 outliers": Int8Config(threshold=1.9),
    "int8 outliers of tokens": Int8Config(threshold=1.9, per_token_outliers=True),
    "e4m3": FP8Config(),
    "e5m2": FP8Config(dtype="e5m2"),
    "mxfp4": FP4Config(format="mxfp4"),
    "nvfp4": FP4Config(),
}
OTHERS = {
    "fp8 rounded": FP8Config(activations="dynamic"),
    "nvfp4 rounded": FP4Config(activations="dynamic"),
}
formats = pytest.mark.parametrize("name", FORMATS)


def tokens(t=40, experts=5, none=True, dtype=torch.float32):
    """More than a block of rows for expert 1, none for expert 3, and places without an expert."""
    g = torch.Generator().manual_seed(4)
    x = torch.randn(t, 64, generator=g).to(dtype)
    ids = torch.tensor([0, 1, 1, 2, 4])[torch.randint(0, 5, (t, 2), generator=g)]
    ids[:, 0] = torch.where(ids[:, 1] == 1, 0, 1)
    if none:
        ids[::7, 1] = experts
    return x.to(DEVICE), ids.to(DEVICE), torch.rand(t, 2, generator=g).to(DEVICE, dtype)


def made(source, config, backend="triton"):
    return QuantizedExperts.from_experts(source.to(DEVICE), dataclasses.replace(config, backend=backend))


@pytest.fixture
def launches(monkeypatch):
    """How many rows each launch had."""
    seen = []
    apply = launch.ExpertProduct.apply

    def counted(x, *more):
        seen.append(len(x))
        return apply(x, *more)

    monkeypatch.setattr(module_file.ExpertProduct, "apply", counted)
    return seen


def both_ways(module, x, ids, name="gate_up_proj"):
    """The products of sorted rows and their gradients: in one launch, and one expert after the other."""
    order, offsets = launch.sort(ids, module.num_experts)
    bias, codes = getattr(module, f"{name}_bias", None), module._stacked(name)
    rows, runs = x[order // ids.shape[1]], route(ids, module.num_experts).runs
    last = sum(count for _, count in runs)
    together, alone = (rows.clone().requires_grad_() for _ in range(2))
    y = launch.ExpertProduct.apply(together, bias, codes, offsets, x.dtype)
    assert torch.equal(y[last:], torch.zeros_like(y[last:]))
    found, wanted = [y[:last]], [grouped(alone[:last], runs, module._product(name))]
    for values, given in ((found, together), (wanted, alone)):
        leaves = [given] if bias is None else [given, bias]
        values += torch.autograd.grad(values[0].float().square().sum(), leaves)
    return found, wanted


@on_device
@formats
def test_equals_one_expert_after_the_other(experts, name):
    module = made(experts(has_bias=True, is_transposed=True), FORMATS[name])
    found, wanted = both_ways(module, *tokens()[:2])
    assert len(found) == 3
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() < 1e-6 * b.norm()


@on_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int8 outliers", "mxfp4"])
def test_half_precision(experts, name, dtype):
    found, wanted = both_ways(made(experts(dtype=dtype), FORMATS[name]), *tokens(18, dtype=dtype)[:2])
    assert found[0].dtype == dtype
    for a, b in zip(found, wanted, strict=True):
        assert (a.float() - b.float()).norm() < (8e-3 if dtype == torch.bfloat16 else 1e-3) * b.float().norm()


@on_device
@pytest.mark.parametrize("has_gate", [True, False])
def test_a_whole_module(experts, launches, has_gate):
    source = experts(has_gate=has_gate)
    found, wanted = (made(source, FP4Config(), b)(*tokens(18)) for b in ("triton", "reference"))
    assert launches == [36, 36]
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


@on_device
def test_outlier_columns_are_those_of_an_expert(experts, launches):
    """One large number changes nothing for tokens of other experts, and the columns of its own."""
    module = made(experts(), Int8Config(threshold=6.0))
    x, ids, weights = tokens(18, none=False)
    x = x.clamp(-3, 3)
    large = x.clone()
    token = int((ids == 4).any(1).nonzero()[0])
    large[token, 7] = 50.0
    with torch.no_grad():
        before, after = module(x, ids, weights), module(large, ids, weights)
    mine = torch.isin(ids, ids[token]).any(1)
    assert torch.equal(before[~mine], after[~mine])
    assert not torch.equal(before[mine], after[mine])


@on_device
@formats
def test_no_rows_and_no_experts(experts, launches, name):
    module = made(experts(), FORMATS[name])
    x, ids, weights = tokens(3)
    assert torch.equal(module(x, torch.full_like(ids, 5), weights), torch.zeros_like(x))
    assert torch.equal(module(x, torch.full_like(ids, 5), torch.full_like(weights, torch.inf)), torch.zeros_like(x))
    assert module(x[:0], ids[:0], weights[:0]).shape == (0, 64)
    assert len(launches) == 6


@on_device
@pytest.mark.parametrize("name", OTHERS)
def test_what_the_kernel_does_not_round_goes_one_by_one(experts, launches, name):
    made(experts(), OTHERS[name])(*tokens(3, none=False))
    assert launches == []


@on_device
@formats
def test_other_backends_and_dtypes_go_one_by_one(experts, launches, name):
    x, ids, weights = tokens(8)
    for backend in ("auto", "reference") if DEVICE == "cpu" else ("reference",):
        made(experts(), FORMATS[name], backend)(x, ids, weights)
    assert launches == []
    assert not launch.one_launch(x.double(), dataclasses.replace(FORMATS[name], backend="triton"))
    assert not launch.one_launch(x, dataclasses.replace(FORMATS[name], backend="triton", out_dtype=torch.float64))


@on_device
def test_sorted_as_the_host_sorts():
    _, ids, _ = tokens()
    order, runs = route(ids, 5)
    found, offsets = launch.sort(ids, 5)
    assert torch.equal(found[: len(order)], order)
    assert offsets.dtype == torch.int32
    assert offsets.diff().tolist() == [dict(runs).get(e, 0) for e in range(5)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_triton_kernels_compile_for_each_gpu():
    assert_compiles("eff_quant.experts.triton")
