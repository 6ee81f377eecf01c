import pytest
import torch
from eff_kernels import native
from eff_kernels.ops.neighborhood_attention import reference, unfused
from eff_kernels.ops.neighborhood_attention import unfused_cpu as cpu
from eff_kernels.ops.neighborhood_attention.common import window_index
from eff_kernels.ops.neighborhood_attention.unfused import AV_OP, INVERSE_OP, QK_OP

WINDOWS = {
    "line": ((7,), (3,), (1,), (2,), (False,)),
    "causal-line": ((9,), (4,), (2,), (2,), (True,)),
    "map": ((5, 7), (3, 4), (2, 1), (1, 1), (False, False)),
    "video": ((3, 4, 4), (2, 3, 2), (1, 1, 2), (1, 1, 2), (True, False, False)),
}


@pytest.fixture(params=WINDOWS)
def windows(request):
    shape, *rest = WINDOWS[request.param]
    return shape, [list(w) for w in rest]


def draw(shape, *last):
    return torch.randn(1, 2, *shape, *last, dtype=torch.float64, requires_grad=True)


def test_index_is_the_mask(windows):
    shape, settings = windows
    index, there = window_index(shape, *(tuple(s) for s in settings))
    mask = torch.zeros(index.size(1), index.size(1), dtype=torch.bool)
    for slot, inside in zip(index, there, strict=True):
        mask[torch.arange(index.size(1))[inside], slot[inside]] = True
    assert torch.equal(mask, reference.neighborhood_mask(shape, *settings))


def test_missing_slots_come_last():
    _, there = window_index((9,), (4,), (1,), (1,), (True,))
    assert there.int().diff(dim=0).max() <= 0
    assert there[:, 0].tolist() == [True, False, False, False]


def test_halves_with_a_softmax_are_the_whole(windows):
    shape, settings = windows
    q, k, v = (draw(shape, 4) for _ in range(3))
    scores = QK_OP(q / 2, k, *settings)
    weights = scores.softmax(-1)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    out = AV_OP(weights, v, *settings)
    none = q.new_empty(1, 0, 2, 4)
    heads_last = [t.movedim(1, -2) for t in (q, k, v)]
    wanted, lse = reference.neighborhood_attention(*heads_last, *settings, 0.5, none, none)
    torch.testing.assert_close(out.movedim(1, -2), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scores.logsumexp(-1).movedim(1, -1), lse, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, (q, k, v), grad)
    torch.testing.assert_close(
        actual, torch.autograd.grad(wanted, (q, k, v), grad.movedim(1, -2)), rtol=1e-10, atol=1e-10
    )


def test_derivatives_of_each_product(windows):
    shape, settings = windows
    slots = len(window_index(shape, *(tuple(s) for s in settings))[0])
    x, y, w = draw(shape, 3), draw(shape, 3), draw(shape, slots)

    def scores(a, b):
        s = QK_OP(a, b, *settings)
        return s.masked_fill(s == -torch.inf, 0)

    assert torch.autograd.gradcheck(scores, (x, y), fast_mode=True)
    assert torch.autograd.gradgradcheck(scores, (x, y), fast_mode=True)
    for op in (AV_OP, INVERSE_OP):
        assert torch.autograd.gradcheck(lambda a, b, op=op: op(a, b, *settings), (w, x), fast_mode=True)


@pytest.mark.parametrize("op", [QK_OP, AV_OP, INVERSE_OP], ids=lambda o: o.name)
def test_registration(op):
    shape, *rest = WINDOWS["map"]
    settings = [list(w) for w in rest]
    first = draw(shape, 3 if op is QK_OP else 12)
    torch.library.opcheck(op.registered, (first.detach(), draw(shape, 3).detach(), *settings, "reference"))


def compiled(op):
    return next(b for b in op.backends if b.name == "cpu").run


@pytest.mark.skipif(bool(native.unavailable()), reason=str(native.unavailable()))
@pytest.mark.parametrize("d", [5, 16, 40, 136])
@pytest.mark.parametrize("define", [None, "EFF_GENERIC", "EFF_NO_AVX512"])
def test_compiled_code_is_the_reference(windows, d, define, monkeypatch):
    shape, settings = windows
    slots = len(window_index(shape, *(tuple(s) for s in settings))[0])
    x, y = (torch.randn(2, *shape, 3, d).movedim(-2, 1) for _ in range(2))  # heads last in memory
    w = torch.randn(2, 3, *shape, slots)
    if define:
        monkeypatch.setattr(cpu.native, "library", lambda build=native.library: build(define))
    cpu._kernel.cache_clear()
    try:
        for op, first in ((QK_OP, x), (AV_OP, w), (INVERSE_OP, w)):
            wanted = getattr(unfused, op.name.removeprefix("neighborhood_"))(first.double(), y.double(), *settings)
            got = compiled(op)(first, y, *settings)
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=2e-5)  # float32 sums of up to 136 terms
            half = compiled(op)(first.bfloat16(), y.bfloat16(), *settings)
            assert half.dtype == torch.bfloat16
            again = compiled(op)(first.bfloat16().float(), y.bfloat16().float(), *settings)
            assert torch.equal(half, again.bfloat16())  # rounded once
    finally:
        cpu._kernel.cache_clear()


@pytest.mark.skipif(bool(native.unavailable()), reason=str(native.unavailable()))
def test_threads_do_not_change_the_bits(windows):
    shape, settings = windows
    x, y = torch.randn(2, 4, 2, *shape, 64)
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        w = QK_OP(x, y, *settings).masked_fill(QK_OP(x, y, *settings) == -torch.inf, 0)
        found.append((w, AV_OP(w, y, *settings), INVERSE_OP(w, x, *settings)))
    torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
