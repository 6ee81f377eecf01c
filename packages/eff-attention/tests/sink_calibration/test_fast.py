"""The fast path on single calls whose queries have next to nothing but sinks."""

import pytest
import torch
from eff_attention.sink_calibration import calibrate_attention, fast
from eff_attention.sink_calibration.measure import look
from eff_kernels.edit.attention import AttentionCall, attend_explicit, dense

HEADS = (0, 3)


def call_of(dtype, heavy):
    """A causal call of 64 queries; those in ``heavy`` give nearly all, or all of their weight to key 5."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 64, 8, generator=random) for h in (4, 2, 2))
    for n, row in enumerate(heavy):
        q[:, :, row] = (4 + 40 * (n % 2)) * k[:, :, 5].repeat_interleave(2, 1)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    return AttentionCall(torch.nn.Identity(), "attention", 0, q, k, v, scale=8**-0.5, causal=True)


def both(call):
    sinks = torch.zeros(2, 2, 64, dtype=torch.bool)
    sinks[:, :, 5] = True
    sinks[1, 0, 9] = True  # one head has two
    lse = look(call, HEADS, torch.ones(2, 64, dtype=torch.bool)).lse
    base = dense(call).out
    found = fast.calibrated(call, base, lse, sinks, HEADS, 0.4)
    wanted = attend_explicit(call, edit_weights=lambda w, part: calibrate_attention(w, sinks, 0.4), heads=HEADS).out
    return base, found, wanted


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_heavy_queries_get_their_whole_row(dtype, bound):
    base, found, wanted = both(call_of(dtype, (40, 41, 50, 63)))
    error = (found[:, list(HEADS)] - wanted).float().norm(dim=-1)
    assert (error <= bound * wanted.float().norm(dim=-1)).all()
    assert torch.equal(found[:, [1, 2]], base[:, [1, 2]])


@torch.no_grad()
def test_many_heavy_queries_are_left_to_the_explicit_path():
    assert both(call_of(torch.float32, range(20, 64)))[1] is None
