import pytest
import torch
from eff_kernels.op import triton_interprets
from eff_kernels.ops.int8_quantize import api, int8_quantize_columns, int8_quantize_rows
from eff_kernels.testing.aot import assert_compiles
from hypothesis import given, settings
from hypothesis import strategies as st

BACKENDS = ["cpu", "reference", *(["triton"] if triton_interprets() else [])]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def test_worked_example(backend):
    a = torch.tensor([[1.0, -2.0, 8.0, 0.5], [0.25, 3.0, -0.5, -1.0]])
    codes, absmax, outliers = int8_quantize_rows(a, threshold=6.0, backend=backend)
    assert codes.tolist() == [[64, -127, 0, 32], [11, 127, 0, -42]]  # 63.5 and 31.75: half to even
    assert absmax.tolist() == [2.0, 3.0]
    assert outliers.tolist() == [2]
    codes, absmax, outliers = int8_quantize_rows(a, backend=backend)
    assert codes.tolist() == [[16, -32, 127, 8], [11, 127, -21, -42]]
    assert absmax.tolist() == [8.0, 3.0]
    assert outliers.tolist() == []


def brute_force(x, threshold):
    """Entry by entry, in float32 as the definition says."""
    rows, k = x.shape
    columns = [j for j in range(k) if threshold and any(abs(float(x[i, j])) >= threshold for i in range(rows))]
    codes, absmax = torch.zeros(rows, k, dtype=torch.int8), torch.zeros(rows)
    for i in range(rows):
        inliers = [abs(float(v)) for v in x[i] if not threshold or abs(float(v)) < threshold]
        absmax[i] = max(inliers, default=0.0)
        if absmax[i] > 0:
            scale = 127.0 / absmax[i]
            for j in set(range(k)) - set(columns):
                codes[i, j] = int((x[i, j].float() * scale).round())
    return codes, absmax, torch.tensor(columns, dtype=torch.int64)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    k=st.integers(0, 70),
    threshold=st.sampled_from([0.0, 0.5, 2.0, 6.0, float("inf")]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 10_000),
)
def test_equals_brute_force(rows, k, threshold, dtype, seed):
    x = (torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)
    expected = brute_force(x, threshold)
    for name in BACKENDS:
        for actual, wanted in zip(int8_quantize_rows(x, threshold=threshold, backend=name), expected, strict=True):
            assert torch.equal(actual, wanted), name


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 20),
    k=st.one_of(st.integers(0, 40), st.integers(250, 530)),
    threshold=st.sampled_from([0.0, 0.5, 2.0, 6.0, float("inf")]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bad=st.sampled_from([0.0, float("nan"), float("inf")]),
    seed=st.integers(0, 10_000),
)
def test_columns_equal_the_reference_bit_for_bit(rows, k, threshold, dtype, bad, seed):
    x = (torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)
    if x.numel():
        x[rows // 2, k // 2] = bad
    compiled = int8_quantize_columns(x, threshold=threshold, backend="cpu")
    plain = int8_quantize_columns(x, threshold=threshold, backend="reference")
    for actual, wanted in zip(compiled, plain, strict=True):
        assert torch.equal(actual.nan_to_num(-1.0), wanted.nan_to_num(-1.0))


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_columns_are_rows_of_the_transpose_without_outliers(backend, threshold):
    x = torch.randn(6, 11).clamp(-1.9, 1.9)
    columns = int8_quantize_columns(x, threshold=threshold, backend=backend)
    rows = int8_quantize_rows(x.t(), threshold=threshold)
    assert torch.equal(columns.codes, rows.codes.t())
    assert torch.equal(columns.absmax, rows.absmax)
    assert columns.outlier_columns.numel() == 0


def test_columns_with_outliers(backend):
    x = torch.tensor([[1.0, 9.0], [-2.0, 3.0]])
    codes, absmax, outliers = int8_quantize_columns(x, threshold=6.0, backend=backend)
    assert codes.tolist() == [[64, 0], [-127, 0]]
    assert absmax.tolist() == [2.0, 3.0]
    assert outliers.tolist() == [1]


def test_zero_rows_have_no_nan(backend):
    codes, absmax, _ = int8_quantize_rows(torch.zeros(2, 5), backend=backend)
    assert not codes.any()
    assert not absmax.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("k", [3, 20])  # within a vector, and in what is left of it
def test_nan_and_infinity_mark_their_row_alone(backend, bad, k):
    x = torch.ones(3, k)
    x[1, 2] = bad
    codes, absmax, _ = int8_quantize_rows(x, backend=backend)
    assert absmax[1].isnan()
    assert not codes[1].any()
    assert absmax[[0, 2]].tolist() == [1.0, 1.0]
    assert (codes[[0, 2]] == 127).all()


def test_an_infinite_outlier_is_an_outlier(backend):
    x = torch.ones(2, 12)
    x[0, 5] = float("inf")
    codes, absmax, outliers = int8_quantize_rows(x, threshold=6.0, backend=backend)
    assert outliers.tolist() == [5]
    assert absmax.tolist() == [1.0, 1.0]
    assert not codes[:, 5].any()


def test_leading_dimensions_and_strides(backend):
    x = torch.randn(2, 3, 40)[..., ::2]
    codes, absmax, _ = int8_quantize_rows(x, backend=backend)
    flat = int8_quantize_rows(x.reshape(6, 20).contiguous(), backend="reference")
    assert torch.equal(codes, flat.codes.view(2, 3, 20))
    assert torch.equal(absmax, flat.absmax.view(2, 3))


def test_same_codes_as_bitsandbytes(backend):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the peer is not installed")
    assert bitsandbytes
    for rows, k, threshold in [(1, 300, 6.0), (40, 300, 6.0), (40, 300, 0.0)]:
        x = (torch.randn(rows, k) * 2.2).half()
        theirs = torch.ops.bitsandbytes.int8_vectorwise_quant(x.clone(), threshold)
        ours = int8_quantize_rows(x, threshold=threshold, backend=backend)
        assert torch.equal(ours.codes, theirs[0])
        assert torch.equal(ours.absmax, theirs[1])
        assert torch.equal(ours.outlier_columns, theirs[2] if threshold else torch.empty(0, dtype=torch.int64))


def test_works_under_compile():
    def run(x):
        return api.ROWS_OP(x, 0.0)

    x = torch.randn(4, 20)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    assert all(torch.equal(a, b) for a, b in zip(compiled, run(x), strict=True))


@pytest.mark.parametrize(
    ("x", "threshold", "error", "message"),
    [
        (torch.tensor(1.0), 0.0, ValueError, "scalar"),
        (torch.ones(2, 2, dtype=torch.int32), 0.0, TypeError, "int32"),
        (torch.ones(2, 2), -1.0, ValueError, "-1"),
        (torch.ones(2, 2), float("nan"), ValueError, "nan"),
    ],
)
def test_errors_name_what_they_saw(x, threshold, error, message):
    with pytest.raises(error, match=message):
        int8_quantize_rows(x, threshold=threshold)


def test_triton_kernels_compile_for_each_gpu():
    assert_compiles("eff_kernels.ops.int8_quantize.triton")
