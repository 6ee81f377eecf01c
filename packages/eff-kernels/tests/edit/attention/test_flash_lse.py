"""A causal prompt by PyTorch's flash attention for CPUs: its bits, its log-sum-exp, and which calls it leaves alone."""

import pytest
import torch
from eff_kernels.edit.attention import AttentionCall
from eff_kernels.edit.attention.call import Edit
from eff_kernels.edit.attention.explicit import flash_with_lse
from torch.nn.functional import scaled_dot_product_attention


def prompt(dtype=torch.float32, heads=4, keys=40):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, keys, 16, generator=generator).to(dtype) for h in (4, heads, heads))
    return AttentionCall(torch.nn.Identity(), "attention", 0, q, k, v, scale=0.4, causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [4, 2])
def test_its_bits_are_those_of_sdpa_and_its_sums_those_of_the_scores(dtype, heads):
    call = prompt(dtype, heads)
    found = flash_with_lse(call)
    wanted = scaled_dot_product_attention(call.q, call.k, call.v, is_causal=True, scale=0.4, enable_gqa=heads != 4)
    assert torch.equal(found.out, wanted)
    scores = call.q.double() @ call.k.double().repeat_interleave(4 // heads, 1).mT * 0.4
    scores = scores.masked_fill(torch.ones(40, 40, dtype=torch.bool).triu(1), -torch.inf)
    bound = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found.lse.double(), scores.logsumexp(-1), rtol=bound, atol=bound)


OTHERS = {
    "sees the future": {"causal": False},
    "begins later": {"offset": 2},
    "mask": {"mask": torch.ones(40, 40, dtype=torch.bool)},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.zeros(4)},
    "bias": {"bias": torch.zeros(1, 4, 40, 40)},
    "window": {"window": 4},
    "edits": {"edits": (Edit(None, lambda block, part: block, None, None),)},
    "dropout": {"dropout": 0.1},
    "weights are wanted": {"wants_weights": True},
    "fewer queries": {"q": torch.zeros(2, 4, 3, 16)},
    "another batch": {"q": torch.zeros(1, 4, 40, 16)},
    "two dtypes": {"v": torch.zeros(2, 4, 40, 16, dtype=torch.bfloat16)},
    "float64": {n: torch.zeros(2, 4, 40, 16, dtype=torch.float64) for n in "qkv"},
    "gradient": {"k": torch.zeros(2, 4, 40, 16, requires_grad=True)},
    "on another device": {n: torch.zeros(2, 4, 40, 16, device="meta") for n in "qkv"},
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_calls_are_left_to_the_host(what):
    call = prompt()
    assert flash_with_lse(call) is not None
    assert flash_with_lse(call.replace(**OTHERS[what])) is None


def test_what_another_kernel_answers_is_left_to_it():
    call = prompt()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert flash_with_lse(call) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_with_lse(call) is None
