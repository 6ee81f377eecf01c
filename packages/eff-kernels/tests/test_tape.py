"""Recorded kernel calls: the same bits as the function, for new inputs; whatever PyTorch computes is refused."""

import threading

import pytest
import torch
from eff_kernels import add_rms_norm, decode_attention, linear, rms_norm, rope, swiglu
from eff_kernels.native.tape import NotRecordableError, Recorded

WEIGHT = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
NORM = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5
DOWN = torch.randn(64, 48, generator=torch.Generator().manual_seed(2))


def layer(x, residual):
    x, residual = add_rms_norm(rms_norm(x, NORM), residual, NORM)
    both = linear(x, WEIGHT)
    return add_rms_norm(linear(swiglu(both[:, :48], both[:, 48:]), DOWN), residual, NORM)[0]


def draw(rows, seed):
    return torch.randn(2, rows, 64, generator=torch.Generator().manual_seed(seed)).unbind(0)


@pytest.mark.parametrize("rows", [1, 3])
@torch.inference_mode()
def test_repeats_the_function_for_new_inputs(rows):
    inputs = draw(rows, 0)
    recorded = Recorded(layer, *inputs)
    assert len(recorded) == 6
    assert torch.equal(recorded.output, layer(*inputs))
    garbage = []
    for seed in range(1, 6):
        inputs = draw(rows, seed)
        garbage += [
            torch.full((rows, 96), float(seed)),
            torch.full((rows, 64), float(seed)),
        ]  # in memory that was freed
        assert torch.equal(recorded(*inputs), layer(*inputs))


@torch.inference_mode()
def test_views_of_a_paged_cache_and_smaller_inputs():
    keys = torch.randn(6, 2, 16, 8)

    def attend(x, cos, lengths, table):
        turned = rope(x.view(2, 4, 1, 8), cos, cos).view(2, 4, 8)
        return decode_attention(turned[:, :4], keys, keys, lengths, block_table=table)

    x, cos = torch.randn(2, 32), torch.rand(2, 1, 4)
    lengths = torch.tensor([5, 20], dtype=torch.int32)
    table = torch.tensor([[0, 0, 0], [1, 2, 0]], dtype=torch.int32)
    recorded = Recorded(attend, x, cos, lengths, table)
    for counts, pages in (([9, 17], [[3, 0], [4, 5]]), ([1, 2], [[1], [2]])):
        x = torch.randn(2, 32)
        lengths, table = (torch.tensor(v, dtype=torch.int32) for v in (counts, pages))
        assert torch.equal(recorded(x, cos, lengths, table), attend(x, cos, lengths, table))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: rms_norm(x, NORM) * 2, "mul"),
        (lambda x: rms_norm(torch.cat([x, x]), NORM), "cat"),
        (lambda x: rms_norm(x.t().reshape(-1, 64), NORM), "reshape"),
        (lambda x: rms_norm(x.add_(1), NORM), "add_"),
        (lambda x: rms_norm(x.bfloat16(), NORM), "bfloat16"),
        (lambda x: (x.__setitem__(0, 1.0), rms_norm(x, NORM))[1], "written to"),
        (lambda x: rms_norm(x, NORM, backend="reference"), "runs between the compiled kernels"),
    ],
)
@torch.inference_mode()
def test_what_pytorch_computes_is_refused(function, name):
    with pytest.raises(NotRecordableError, match=name):
        Recorded(function, torch.randn(2, 64))
    assert torch.equal(
        Recorded(lambda x: rms_norm(x, NORM), torch.ones(1, 64)).output, rms_norm(torch.ones(1, 64), NORM)
    )


@torch.inference_mode()
def test_calls_of_other_threads_are_not_noted():
    stop, x = threading.Event(), torch.randn(1, 64)

    def disturb():
        while not stop.is_set():
            rms_norm(x, NORM)

    other = threading.Thread(target=disturb)
    other.start()
    try:
        for _ in range(20):
            assert len(Recorded(layer, *draw(1, 0))) == 6
    finally:
        stop.set()
        other.join()
