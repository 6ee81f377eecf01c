"""What the layer computes: worked example, limits, error bound, outliers, independence of rows (arXiv 2208.07339)."""

import pytest
import torch
from eff_quant import Int8Config, Int8Linear
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

BACKENDS = ["auto", "reference"]

A = torch.tensor([[1, -2, 8, 0.5], [0.25, 3, -0.5, -1]])
W = torch.tensor([[0.5, -1, 0.25, 2], [1, 1, -4, 0.5]])


def layer(weight, bias=None, **settings):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return Int8Linear.from_linear(linear, Int8Config(**settings)).requires_grad_(False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("threshold", "output"),
    [
        (6.0, [[5.547, -32.75], [-5.004, 4.785]]),
        (0.0, [[5.5625, -32.75], [-5.004, 4.770]]),
    ],
)
def test_worked_example(threshold, output, backend):
    int8 = layer(W, threshold=threshold, backend=backend)
    assert int8.codes.tolist() == [[32, -64, 16, 127], [32, 32, -127, 16]]
    assert int8.SCB.tolist() == [2.0, 4.0]
    # The expected values were computed in float16, whose step at 32 is 1/32 and at 5 is 1/256.
    torch.testing.assert_close(int8(A), torch.tensor(output), atol=4e-3, rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@given(rows=st.integers(1, 9), n=st.integers(1, 20), k=st.integers(1, 70), seed=st.integers(0, 2**20))
@settings(max_examples=25, deadline=None)
def test_codes_that_hold_the_values_exactly_give_the_exact_product(backend, rows, n, k, seed):
    g = torch.Generator().manual_seed(seed)

    def representable(r):  # integers up to 127 times a power of two, with the largest in each row
        codes = torch.randint(-127, 128, (r, k), generator=g)
        codes[:, 0] = 127
        return codes.float() * 2.0 ** torch.randint(-6, 3, (r, 1), generator=g)

    x, weight = representable(rows), representable(n)
    y = layer(weight, threshold=0.0, backend=backend)(x)
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    assert ((y.double() - exact).abs() <= 4 * torch.finfo(torch.float32).eps * size).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_threshold_is_none(backend):
    x, weight = torch.randn(5, 33) * 4, torch.randn(7, 33)
    none = layer(weight, threshold=0.0, backend=backend)(x)
    assert torch.equal(layer(weight, threshold=float("inf"), backend=backend)(x), none)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tiny_threshold_leaves_only_the_error_of_the_weights(backend, per_token):
    x, weight = torch.randn(5, 33), torch.randn(7, 33)
    int8 = layer(weight, threshold=1e-30, per_token_outliers=per_token, backend=backend)
    exact = x.double() @ int8.dequantize(torch.float64).T
    size = x.double().abs() @ int8.dequantize(torch.float64).abs().T
    # 33 products and sums in float32, each within half a unit of the running sum
    assert ((int8(x).double() - exact).abs() <= 40 * torch.finfo(torch.float32).eps * size).all()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_zeros_give_zeros(backend, threshold):
    x, weight = torch.randn(4, 16), torch.randn(6, 16)
    x[2], weight[3] = 0, 0
    y = layer(weight, threshold=threshold, backend=backend)(x)
    assert torch.isfinite(y).all()
    assert (y[2] == 0).all()
    assert (y[:, 3] == 0).all()
    assert (y[0, :3] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@given(rows=st.integers(1, 6), n=st.integers(1, 12), k=st.integers(1, 90), seed=st.integers(0, 2**20))
@settings(max_examples=25, deadline=None)
def test_the_error_stays_within_the_bound_of_rounding(backend, rows, n, k, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=g)
    weight = torch.randn(n, k, generator=g).half().float()
    y = layer(weight, threshold=0.0, backend=backend)(x).double()
    x, weight = x.double(), weight.double()
    sca, scb = x.abs().amax(1)[:, None], weight.abs().amax(1)[None]
    # each factor is off by at most half a step: |x w - x' w'| <= |w| da + |x| db + da db
    bound = k * (sca / 254 * scb + scb / 254 * sca + sca / 254 * scb / 254)
    assert ((y - x @ weight.T).abs() <= bound * (1 + 1e-6)).all()


def sqnr(y, exact):
    return 10 * torch.log10(exact.square().mean() / (y - exact).square().mean()).item()


def test_an_outlier_column_spoils_int8_and_the_decomposition_restores_it():
    x, weight = torch.randn(500, 256), torch.randn(64, 256)
    x[:, 17] *= 60
    rest = x.clone()
    rest[:, 17] = 0
    without, decomposed = (layer(weight, threshold=t, activation_group=None) for t in (0.0, 6.0))
    stored = decomposed.dequantize()
    own = x[:, 17:18] @ stored[:, 17:18].T  # what the outlier column contributes
    others = rest @ stored.T
    assert sqnr(without(x) - own, others) < 20
    assert sqnr(decomposed(x) - own, others) > 40
    # with the outlier column apart the others are as precise as if it were not there
    assert sqnr(decomposed(x) - own, others) > sqnr(without(rest), others) - 0.5


@pytest.mark.parametrize("settings", [{"threshold": 0.0}, {"threshold": 2.0, "per_token_outliers": True}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_gives_the_same_alone_and_in_a_batch(settings, backend):
    x, weight = torch.randn(16, 96), torch.randn(24, 96)
    int8 = layer(weight, backend=backend, **settings)
    alone = torch.cat([int8(row[None]) for row in x])
    if settings["threshold"] == 0:
        assert torch.equal(int8(x), alone)
    else:  # the outlier product is a float matmul, whose order of summation depends on the shape
        torch.testing.assert_close(int8(x), alone, rtol=1e-5, atol=1e-4)


def test_with_a_threshold_other_rows_decide_which_columns_are_float():
    x, weight = torch.randn(2, 96).clamp(-3, 3), torch.randn(24, 96)
    int8 = layer(weight, threshold=6.0)
    alone = int8(x[:1])
    x[1, ::2] = 20.0  # half of the columns leave the int8 product because of the second row
    together = int8(x)[:1]
    assert not torch.allclose(together, alone, rtol=1e-5, atol=1e-4)
    per_token = layer(weight, threshold=6.0, per_token_outliers=True)
    torch.testing.assert_close(per_token(x)[:1], per_token(x[:1]), rtol=1e-5, atol=1e-4)


def test_weight_only_multiplies_by_the_dequantised_weight():
    x, weight, bias = torch.randn(3, 5, 40) * 50, torch.randn(8, 40), torch.randn(8)
    int8 = layer(weight, bias, activation="none")
    torch.testing.assert_close(int8(x), nn.functional.linear(x, int8.dequantize(), bias), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_static_outlier_columns_keep_their_weights(threshold):
    linear = nn.Linear(64, 32)
    columns = (3, 40)
    config = Int8Config(threshold=threshold, outlier_weights="original", outlier_columns={"": columns})
    int8 = Int8Linear.from_linear(linear, config, outlier_columns=columns)
    x = torch.zeros(4, 64)
    x[:, 3], x[:, 40] = 50.0, -7.0
    torch.testing.assert_close(int8(x), linear(x), rtol=1e-5, atol=1e-4)  # nothing of it went through int8
    x = torch.randn(200, 64)
    x[:, columns] *= 60
    plain = layer(linear.weight.detach(), linear.bias.detach(), threshold=6.0)
    exact = linear(x)
    assert sqnr(int8(x), exact) > sqnr(plain(x), exact) + 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16])
def test_the_output_has_the_dtype_of_the_input_unless_told(dtype, out_dtype):
    x, weight = torch.randn(2, 3, 16), torch.randn(5, 16)
    y = layer(weight, torch.randn(5), out_dtype=out_dtype)(x.to(dtype))
    assert y.dtype == (out_dtype or dtype)
    assert y.shape == (2, 3, 5)


@pytest.mark.parametrize("group", [None, 32, 128])
def test_the_layer_rounds_activations_in_groups(group):
    x, weight = torch.randn(7, 300), torch.randn(20, 300)
    int8 = layer(weight, threshold=0.0, activation_group=group)
    wanted = torch.zeros(7, 20, dtype=torch.float64)
    for k in range(0, 300, group or 300):
        part = x[:, k : k + (group or 300)].double()
        scale = part.abs().amax(1, keepdim=True) / 127
        wanted += (part / scale).round() * scale @ int8.dequantize()[:, k : k + (group or 300)].double().T
    torch.testing.assert_close(int8(x).double(), wanted, rtol=0, atol=1e-4)
