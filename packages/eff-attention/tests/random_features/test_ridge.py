import numpy as np
import pytest
import torch
from eff_attention.random_features.ridge import fit_ridge


class Matrix:
    def __init__(self, matrix, step=None):
        self.matrix, self.step = matrix, step or 10**9
        self.num_samples, self.num_features = matrix.shape

    def rows(self):
        for start in range(0, self.num_samples, self.step):
            yield slice(start, start + self.step), self.matrix[start : start + self.step]

    def columns(self):
        for start in range(0, self.num_features, self.step):
            yield slice(start, start + self.step), self.matrix[:, start : start + self.step]


def problem(n, p, targets=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    f = torch.randn(n, p, generator=g, dtype=torch.float64) + 0.7
    y = f @ torch.randn(p, targets, generator=g, dtype=torch.float64) + torch.randn(
        n, targets, generator=g, dtype=torch.float64
    )
    return f, y + 3


def brute(f, y, alpha, intercept):
    """Normal equations with an explicit column of ones that has no penalty."""
    n, p = f.shape
    design = torch.cat([f, f.new_ones(n, 1)], 1) if intercept else f
    penalty = torch.eye(design.shape[1], dtype=f.dtype) * n * alpha
    if intercept:
        penalty[p, p] = 0
    hat_inverse = torch.linalg.inv(design.T @ design + penalty)
    solution = hat_inverse @ design.T @ y
    return solution[:p], solution[p] if intercept else y.new_zeros(y.shape[1]), design @ hat_inverse @ design.T


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(("n", "p"), [(9, 14), (30, 6), (12, 12)])
def test_every_solver_is_the_normal_equations(n, p, intercept):
    f, y = problem(n, p)
    coef, constant, _ = brute(f, y, 0.05, intercept)
    for solver in ("dual", "primal", "cg", "auto"):
        for step in (None, 4):
            fitted = fit_ridge(Matrix(f, step), y, alpha=0.05, alphas=None, intercept=intercept, solver=solver)
            torch.testing.assert_close(fitted.coef, coef, rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(fitted.intercept, constant, rtol=1e-8, atol=1e-8)
            assert fitted.solver == (("dual" if n <= p else "primal") if solver == "auto" else solver)
            assert fitted.alpha == 0.05
            assert fitted.path == []


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize(("n", "p"), [(10, 15), (25, 5)])
def test_criteria_are_those_of_refitting(n, p, solver, intercept):
    f, y = problem(n, p)
    alphas = torch.tensor([1e-4, 1e-2, 1.0], dtype=torch.float64)
    for criterion in ("gcv", "loo"):
        fitted = fit_ridge(Matrix(f), y, alpha=criterion, alphas=alphas, intercept=intercept, solver=solver)
        wanted = []
        for alpha in alphas.tolist():
            hat = brute(f, y, alpha, intercept)[2]
            if criterion == "gcv":
                rest = (y - hat @ y).square().sum() / n
                wanted.append(float(rest / (1 - hat.trace() / n) ** 2))
                continue
            errors = []
            for i in range(n):
                kept = [j for j in range(n) if j != i]
                # The penalty n * alpha stays that of all samples, as in the shortcut r_i / (1 - h_ii).
                coef, constant, _ = brute(f[kept], y[kept], alpha * n / (n - 1), intercept)
                errors.append((y[i] - f[i] @ coef - constant).square().mean())
            wanted.append(float(torch.stack(errors).mean()))
        np.testing.assert_allclose([value for _, value in fitted.path], wanted, rtol=1e-7)
        assert fitted.alpha == alphas[int(np.argmin(wanted))]


def test_limits_of_the_penalty():
    f, y = problem(8, 20)
    none = fit_ridge(Matrix(f), y, alpha=1e12, alphas=None, intercept=False)
    assert (f @ none.coef).abs().max() < 1e-8
    mean = fit_ridge(Matrix(f), y, alpha=1e12, alphas=None, intercept=True)
    torch.testing.assert_close(f @ mean.coef + mean.intercept, y.mean(0).expand_as(y), rtol=1e-7, atol=1e-7)
    for intercept in (True, False):
        for alpha in (0.0, 1e-13):
            exact = fit_ridge(Matrix(f), y, alpha=alpha, alphas=None, intercept=intercept)
            assert (f @ exact.coef + exact.intercept - y).square().mean() < 1e-8


def test_without_penalty_the_least_solution():
    f, y = problem(8, 20)
    got = fit_ridge(Matrix(f), y, alpha=0.0, alphas=None, intercept=False)
    torch.testing.assert_close(got.coef, torch.linalg.pinv(f) @ y, rtol=1e-8, atol=1e-8)
    f[:, 3:] = f[:, :1]  # rank 3
    for n in (8, 40):
        f = problem(n, 20)[0]
        f[:, 3:] = f[:, :1]
        y = f[:, :2] + 0.0
        got = fit_ridge(Matrix(f), y, alpha=0.0, alphas=None, intercept=False)
        torch.testing.assert_close(f @ got.coef, y, rtol=1e-6, atol=1e-6)


def test_linear_in_the_targets():
    f, y = problem(12, 9)
    fit = lambda t: fit_ridge(Matrix(f), t, alpha=0.1, alphas=None, intercept=True)  # noqa: E731
    mixed = fit(2 * y[:, :1] - 3 * y[:, 1:])
    torch.testing.assert_close(mixed.coef, 2 * fit(y[:, :1]).coef - 3 * fit(y[:, 1:]).coef, rtol=1e-10, atol=1e-11)


def test_default_grid_follows_the_scale():
    f, y = problem(20, 30)
    small = fit_ridge(Matrix(f), y, alpha="gcv", alphas=None, intercept=True)
    large = fit_ridge(Matrix(1000 * f), y, alpha="gcv", alphas=None, intercept=True)
    assert len(small.path) == 23
    assert large.alpha == pytest.approx(1e6 * small.alpha, rel=1e-6)


def test_conjugate_gradients_name_what_they_cannot():
    f, y = problem(12, 9)
    with pytest.raises(ValueError, match="pass a number for alpha"):
        fit_ridge(Matrix(f), y, alpha="gcv", alphas=None, intercept=True, solver="cg")
    with pytest.raises(ValueError, match="solver='lu'"):
        fit_ridge(Matrix(f), y, alpha=1.0, alphas=None, intercept=True, solver="lu")
    zero = fit_ridge(Matrix(f), torch.zeros_like(y), alpha=1.0, alphas=None, intercept=True, solver="cg")
    assert zero.coef.eq(0).all()
