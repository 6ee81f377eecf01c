"""Functions that are no `Op` refuse tensors on several devices, whichever it is: compiled code reads addresses."""

import pytest
import torch
from eff_kernels import attention_columns, row_calibrated, row_scores, row_values, row_write
from eff_kernels.ops.attention_rows import Limits

Q, K = torch.zeros(1, 2, 8), torch.zeros(1, 2, 4, 8)
LIMITS = torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.bool), torch.zeros(1)
CALLS = {
    "row_scores": (lambda q, k: row_scores(q, k, 1.0), (Q, K)),
    "row_values": (lambda w, v: row_values(w, v, torch.float32), (torch.zeros(1, 2, 4), K)),
    "row_calibrated": (
        lambda q, k, v, old, *limits: row_calibrated(q, k, v, 1.0, old, Limits(*limits), 0.4),
        (Q, K, K, torch.zeros(1, 2, 3), *LIMITS),
    ),
    "attention_columns": (
        lambda q, k, lse: attention_columns(q, k, lse=lse),
        (torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4)),
    ),
    "row_write": (row_write, (torch.zeros(4, 8), torch.arange(2), torch.ones(1, 2, 8))),
}


@pytest.mark.parametrize(("name", "place"), [(n, i) for n, (_, args) in CALLS.items() for i in range(len(args))])
def test_tensors_on_two_devices_are_refused(name, place):
    call, args = CALLS[name]
    call(*args)
    with pytest.raises(ValueError, match=f"{name}: all tensors must be on one device, got .* on meta"):
        call(*(a.to("meta") if i == place else a for i, a in enumerate(args)))


@pytest.mark.parametrize("place", range(3))
def test_limits_of_other_dtypes_are_refused(place):
    call, args = CALLS["row_calibrated"]
    wrong = [a.to(torch.int32) if i == 4 + place else a for i, a in enumerate(args)]
    with pytest.raises(TypeError, match=r"limits must be int64, bool and float32, got .*int32"):
        call(*wrong)
