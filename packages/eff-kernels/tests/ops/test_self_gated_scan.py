import pytest
import torch
from eff_kernels import self_gated_scan
from eff_kernels.op import triton_interprets
from eff_kernels.ops.self_gated_scan import api, reference
from eff_kernels.ops.self_gated_scan.specs import SPECS
from eff_kernels.testing.aot import assert_compiles
from eff_kernels.testing.op_tests import OpTests


class TestSelfGatedScan(OpTests):
    function = staticmethod(self_gated_scan)
    reference = staticmethod(reference.self_gated_scan)
    op = api.OP
    specs = SPECS
    differentiable = ("score", "v")
    factor = 3.0  # a running mean is rounded at every token, the matrix product of the reference is not
    may_refuse = {"triton": "up to 256 features"}  # noqa: RUF012

    def expected(self, schema_args):
        return tuple(keep_public(r, schema_args[-1]) for r in super().expected(schema_args))


def keep_public(results, return_state):
    out, _, _, state = results
    return out, state if return_state else None


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def quadratic(score, v):
    """softmax over the keys up to each token, of a score that does not depend on the token."""
    t = score.size(-1)
    seen = torch.ones(t, t, dtype=torch.bool).tril()
    weight = score.unsqueeze(-2).expand(*score.shape, t).masked_fill(~seen, -torch.inf).softmax(-1)
    return weight @ v


BACKENDS = ["cpu", "reference", *(["triton"] if triton_interprets() else [])]


def test_three_tokens_by_hand():
    score, v = torch.tensor([[[0.0, 0.0, 2.0]]]).log1p(), torch.tensor([[[[4.0], [0.0], [10.0]]]])
    # weights 1, 1, 3
    assert self_gated_scan(score, v).output.flatten().tolist() == pytest.approx([4.0, 2.0, 34 / 5])


def test_is_the_quadratic_form():
    score, v = draw(2, 3, 40), draw(2, 3, 40, 5, seed=1)
    torch.testing.assert_close(self_gated_scan(score, v).output, quadratic(score, v), rtol=0, atol=2e-15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_stable_for_large_scores(backend):
    score = (draw(1, 2, 60).sign() * 1e4 + draw(1, 2, 60, seed=3)).float()
    v = draw(1, 2, 60, 4, seed=1).float()
    found = self_gated_scan(score, v, backend=backend).output
    torch.testing.assert_close(found.double(), quadratic(score.double(), v.double()), rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(1,) * 6 + (24,), (10, 20), (0, 30)])
def test_pieces_with_state_give_the_whole(backend, sizes):
    score, v = draw(2, 4, 30, dtype=torch.float32) * 5, draw(2, 2, 30, 3, seed=1, dtype=torch.float32)
    score[:, :, :2] = -torch.inf
    whole = self_gated_scan(score, v, return_state=True, backend="reference")
    state, parts = None, []
    for s, x in zip(score.split(sizes, 2), v.split(sizes, 2), strict=True):
        before = None if state is None else state.clone()
        out, new = self_gated_scan(s, x, state=state, return_state=True, backend=backend)
        assert state is None or torch.equal(state, before)
        parts.append(out)
        state = new
    torch.testing.assert_close(torch.cat(parts, 2), whole.output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, whole.state, rtol=1e-5, atol=1e-5)
    assert state.shape == (2, 4, 3 + 2)  # d numbers and two a head, as in the paper's table of costs
    assert (whole.output[:, :, :2] == 0).all()


def test_gradients_with_a_state():
    score, v = draw(1, 4, 7).requires_grad_(), draw(1, 2, 7, 3, seed=1).requires_grad_()
    state = self_gated_scan(draw(1, 4, 5, seed=2), draw(1, 2, 5, 3, seed=3), return_state=True).state
    assert torch.autograd.gradcheck(lambda s, x: self_gated_scan(s, x, state=state).output, (score, v))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_gradients_with_a_state_on_other_backends(backend):
    score, v = draw(1, 4, 50, dtype=torch.float32), draw(1, 2, 50, 3, seed=1, dtype=torch.float32)
    score[..., 3] = -torch.inf
    state = self_gated_scan(draw(1, 4, 5, seed=2).float(), v[:, :, :5], return_state=True).state

    def gradients(backend):
        leaves = [score.clone().requires_grad_(), v.clone().requires_grad_()]
        return torch.autograd.grad(self_gated_scan(*leaves, state=state, backend=backend).output.sin().sum(), leaves)

    torch.testing.assert_close(gradients(backend), gradients("reference"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_reaches_its_own_and_later_tokens(backend):
    score, v = torch.zeros(1, 1, 5), torch.ones(1, 1, 5, 2)
    v[0, 0, 2, 1] = torch.nan
    assert self_gated_scan(score, v, backend=backend).output[..., 0].isfinite().all()
    assert self_gated_scan(score, v, backend=backend).output[0, 0, 2:, 1].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": torch.zeros(2, 3, 5)}, "H a multiple of Hkv"),
        ({"v": torch.zeros(2, 2, 6, 3)}, "H a multiple of Hkv"),
        ({"state": torch.zeros(2, 4, 3)}, r"state must be \[2, 4, 5\]"),
        ({"state": torch.zeros(2, 4, 5, requires_grad=True)}, "detach it"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        self_gated_scan(**({"score": torch.zeros(2, 4, 5), "v": torch.zeros(2, 2, 5, 3)} | change))


def test_floats_are_wanted():
    with pytest.raises(TypeError, match="float dtypes"):
        self_gated_scan(torch.zeros(1, 1, 2, dtype=torch.int64), torch.zeros(1, 1, 2, 3))


def test_kernels_compile_for_gpus_that_are_not_there():
    pytest.importorskip("triton")
    assert_compiles("eff_kernels.ops.self_gated_scan.triton")
