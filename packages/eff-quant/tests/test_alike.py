"""Subclasses of `nn.Linear`: those that compute what it computes are quantised, others are left."""

import pytest
import torch
from eff_quant import Int8Config, dequantize_, quantize_
from eff_quant.alike import _probe, computes_as_linear
from torch import nn


class Same(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Scaled(nn.Linear):
    def __init__(self, *sizes, factor=1.0, **options):
        super().__init__(*sizes, **options)
        self.factor = factor

    def forward(self, x):
        return self.factor * super().forward(x)


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class TwiceFromZero(Twice):
    def reset_parameters(self):
        for p in self.parameters():
            nn.init.zeros_(p)


class Normed(nn.Linear):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.register_buffer("mean", torch.zeros(sizes[0]))

    def forward(self, x):
        return super().forward(x - self.mean)


class Options(nn.Linear):
    def forward(self, x, scale=1.0):
        return scale * super().forward(x)


class Shaped(nn.Linear):
    def __init__(self, size):
        super().__init__(size, size)


def test_subclasses_that_compute_the_same_are_taken():
    model = nn.ModuleDict({"same": Same(16, 24), "bare": Same(16, 24, bias=False), "one": Scaled(16, 24)})
    state = torch.get_rng_state()
    x = torch.randn(3, 16)
    torch.set_rng_state(state)
    report = quantize_(model, Int8Config())
    assert torch.equal(torch.get_rng_state(), state)
    assert [e.name for e in report.changed] == ["same", "bare", "one"]
    found = model["same"](x)
    dequantize_(model)
    assert (found - model["same"](x)).norm() < 0.02 * found.norm()


@pytest.mark.parametrize(
    "layer",
    [Twice(16, 16), TwiceFromZero(16, 16), Scaled(16, 16, factor=2.0), Normed(16, 16), Options(16, 16), Shaped(16)],
)
def test_subclasses_that_may_compute_something_else_are_left(layer):
    report = quantize_(nn.ModuleDict({"layer": layer}), Int8Config())
    assert "a subclass of nn.Linear that may use its weight in another way" in report.skipped[0].reason


@pytest.mark.parametrize("seed", range(5))
def test_the_answer_does_not_depend_on_the_dtype_in_which_a_model_is_loaded(seed):
    torch.manual_seed(seed)
    _probe.cache_clear()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert computes_as_linear(Same(16, 24))
    finally:
        torch.set_default_dtype(before)
