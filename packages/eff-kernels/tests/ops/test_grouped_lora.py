import pytest
import torch
from eff_kernels.op import triton_interprets
from eff_kernels.ops.grouped_lora import api, autograd, grouped_lora, reference
from eff_kernels.ops.grouped_lora.specs import SPECS
from eff_kernels.testing.aot import assert_compiles
from eff_kernels.testing.budget import assert_within_budget
from eff_kernels.testing.op_tests import OpTests
from hypothesis import given, settings
from hypothesis import strategies as st

BACKENDS = [b.name for b in api.OP.backends if b.name != "triton" or triton_interprets()]


def positional(x, a, b, ids, weights, scale, y, *, backend="auto"):
    return grouped_lora(x, a, b, ids, weights, scale=scale, y=y, backend=backend)


class TestGroupedLora(OpTests):
    function = staticmethod(positional)
    reference = staticmethod(reference.grouped_lora)
    op = api.OP
    specs = SPECS
    differentiable = ("x", "a", "b", "weights", "y")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def draw(t=6, k=24, n=20, r=4, experts=5, places=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x, a, b, y = (
        torch.randn(*s, generator=generator).to(dtype) for s in ((t, k), (experts, r, k), (experts, n, r), (t, n))
    )
    ids = torch.randint(0, experts, (t, places), generator=generator)
    return x, a, b, ids, torch.rand(t, places, generator=generator), torch.rand(experts, generator=generator), y


def brute_force(x, a, b, ids, weights, scale, y):
    out = y.double().clone()
    for t in range(len(x)):
        for j in range(ids.shape[1]):
            if ids[t, j] >= 0:
                e = ids[t, j]
                gate = weights[t, j].double() * scale[e].double()
                out[t] += gate * (b[e].double() @ (a[e].double() @ x[t].double()))
    return out


def test_worked_example(backend):
    a, b = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[[1.0]], [[10.0]]])
    x, ids = torch.tensor([[2.0, 3.0], [2.0, 3.0], [2.0, 3.0]]), torch.tensor([[0, 1], [1, -1], [-1, -1]])
    weights, scale = torch.tensor([[0.5, 0.25], [2.0, 9.0], [9.0, 9.0]]), torch.tensor([1.0, 3.0])
    y = torch.tensor([[1.0], [1.0], [7.0]])
    # 1 + 0.5 * 2 + 0.25 * 3 * 30; 1 + 2 * 3 * 30; 7
    wanted = torch.tensor([[24.5], [181.0], [7.0]])
    assert torch.equal(grouped_lora(x, a, b, ids, weights, scale=scale, y=y, backend=backend), wanted)


def test_the_loop_over_rows_and_places(backend):
    args = draw()
    args[3][1, 2] = args[3][4] = -1
    found = positional(*args, backend=backend)
    torch.testing.assert_close(found.double(), brute_force(*args), rtol=1e-5, atol=1e-5)


def test_leading_dimensions(backend):
    x, a, b, ids, weights, scale, y = draw(t=12)
    flat = grouped_lora(x, a, b, ids, weights, scale=scale, y=y, backend=backend)
    shaped = grouped_lora(
        x.view(3, 4, -1), a, b, ids.view(3, 4, -1), weights.view(3, 4, -1), scale=scale, y=y.view(3, 4, -1),
        backend=backend,
    )  # fmt: skip
    assert torch.equal(shaped, flat.view(3, 4, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_without_an_expert_keep_their_bits(backend, dtype):
    x, a, b, ids, weights, scale, y = draw(t=8, dtype=dtype)
    ids[::2] = -1
    y[0, 0], y[0, 1] = -0.0, float("inf")
    found = positional(x, a, b, ids, weights, scale, y, backend=backend)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found[::2].view(bits), y[::2].view(bits))
    assert not torch.equal(found[1::2], y[1::2])


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, under Triton's interpreter
def test_nan_stays_with_its_row_and_its_expert(backend):
    x, a, b, ids, weights, scale, y = draw(t=8)
    ids = torch.arange(8)[:, None] % 4
    weights = weights[:, :1]
    clean = positional(x, a, b, ids, weights, scale, y, backend=backend)
    x, b = x.clone(), b.clone()
    x[2, 3], b[3, 0, 0] = float("nan"), float("nan")
    found = positional(x, a, b, ids, weights, scale, y, backend=backend)
    assert found[2].isnan().all()
    assert found[3::4, 0].isnan().all()
    assert torch.equal(found[[0, 1, 4, 5, 6]], clean[[0, 1, 4, 5, 6]])


def test_an_expert_named_twice_counts_twice(backend):
    x, a, b, _, _, scale, y = draw(t=3)
    twice = grouped_lora(x, a, b, torch.tensor([[2, 2]] * 3), scale=scale, y=y, backend=backend)
    once = grouped_lora(x, a, b, torch.tensor([[2]] * 3), torch.full((3, 1), 2.0), scale=scale, y=y, backend=backend)
    torch.testing.assert_close(twice, once)


def test_padding_of_ranks_changes_nothing(backend):
    x, a, b, ids, weights, scale, y = draw()
    wide_a, wide_b = torch.nn.functional.pad(a, (0, 0, 0, 12)), torch.nn.functional.pad(b, (0, 12))
    found = positional(x, wide_a, wide_b, ids, weights, scale, y, backend=backend)
    torch.testing.assert_close(found, positional(x, a, b, ids, weights, scale, y, backend=backend))


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16])
def test_dtypes_may_differ(backend, dtype, factors, y_dtype):
    x, a, b, ids, weights, scale, y = draw()
    args = (x.to(dtype), a.to(factors), b.to(factors), ids, weights, scale, y.to(y_dtype))
    found = positional(*args, backend=backend)
    assert found.dtype == y_dtype
    assert_within_budget(found, reference.grouped_lora, args)


def test_a_row_does_not_depend_on_its_neighbours():
    args = draw(t=40, k=70, n=33, r=9, experts=6)
    x, a, b, ids, weights, scale, y = args
    whole = positional(*args, backend="cpu")
    for t in range(40):
        one = slice(t, t + 1)
        assert torch.equal(positional(x[one], a, b, ids[one], weights[one], scale, y[one], backend="cpu"), whole[one])
    torch.set_num_threads(2)
    try:
        big = [args[0].repeat(9, 1), a, b, *(v.repeat(9, 1) for v in (ids, weights)), scale, y.repeat(9, 1)]
        assert torch.equal(positional(*big, backend="cpu"), whole.repeat(9, 1))
    finally:
        torch.set_num_threads(1)


@settings(max_examples=60, deadline=None)
@given(
    t=st.integers(0, 50),
    k=st.integers(1, 90),
    n=st.integers(1, 40),
    r=st.integers(1, 35),
    experts=st.integers(1, 9),
    places=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_any_shape(t, k, n, r, experts, places, seed):
    args = draw(t, k, n, r, experts, places, seed)
    assert_within_budget(positional(*args, backend="cpu"), reference.grouped_lora, args)


@pytest.mark.parametrize("backend", [b.name for b in autograd.BACKWARD_OP.backends if b.name in BACKENDS])
def test_frozen_experts_cost_no_gradient(backend):
    x, a, b, ids, weights, scale, _ = draw()
    grad = torch.randn(6, 20)
    found = autograd.BACKWARD_OP(grad, x, a, b, ids, weights, scale, False, backend=backend)
    whole = autograd.BACKWARD_OP(grad, x, a, b, ids, weights, scale, True, backend=backend)
    assert found[1].numel() == found[2].numel() == 0
    assert torch.equal(found[0], whole[0])
    assert torch.equal(found[3], whole[3])


def test_an_unused_expert_gets_a_zero_gradient(backend):
    x, a, b, ids, weights, scale, y = draw()
    ids[ids == 2] = 0
    a, b = a.requires_grad_(), b.requires_grad_()
    positional(x, a, b, ids, weights, scale, y, backend=backend).sum().backward()
    assert not a.grad[2].any()
    assert not b.grad[2].any()
    assert a.grad[0].any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [-2, 5, 2**31 + 1])
def test_ids_out_of_range(backend, bad):
    args = draw()
    args[3][2, 1] = bad
    with pytest.raises(IndexError, match=rf"from -1 \(none\) to 4, got .*{bad}"):
        positional(*args, backend=backend)


def changed(**more):
    names = ("x", "a", "b", "ids", "weights", "scale", "y")
    return {**dict(zip(names, draw(), strict=True)), **more}


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        (changed(a=torch.zeros(5, 3, 24)), ValueError, r"\[5, 3, 24\] and \[5, 20, 4\]"),
        (changed(x=torch.zeros(6, 23)), ValueError, r"\[\.\.\., 24\].*\[6, 23\]"),
        (changed(ids=torch.zeros(5, 3, dtype=torch.long)), ValueError, r"\[6, 'k'\].*\[5, 3\]"),
        (changed(ids=torch.zeros(6, 3)), TypeError, r"int32 or int64, got torch\.float32"),
        (changed(weights=torch.zeros(6, 2)), ValueError, r"\[6, 3\], got \[6, 2\]"),
        (changed(scale=torch.zeros(4)), ValueError, r"\[5\], got \[4\]"),
        (changed(y=torch.zeros(6, 21)), ValueError, r"\[6, 20\], got \[6, 21\]"),
        (changed(b=torch.zeros(5, 20, 4).bfloat16()), TypeError, "one dtype"),
        (changed(scale=torch.zeros(5, dtype=torch.long)), TypeError, r"scale.*torch\.int64"),
    ],
)
def test_wrong_arguments(args, error, text):
    x, a, b, ids, weights = (args.pop(n) for n in ("x", "a", "b", "ids", "weights"))
    with pytest.raises(error, match=text):
        grouped_lora(x, a, b, ids, weights, **args)


def test_large_ranks_are_refused_by_triton_with_the_limit():
    reason = api.OP.explain(*draw(r=130)).reasons["triton"]
    assert reason
    assert "128" in reason or "needs a CUDA" in reason


@pytest.mark.timeout(600)
def test_triton_kernels_compile_for_each_gpu():
    assert_compiles("eff_kernels.ops.grouped_lora.triton")
