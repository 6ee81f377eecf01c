"""Long prompts and single queries that rules answer without a map are answered as with one.

An observer beside a rule makes it leave weights to the interception, which computes them in the open.
"""

import pytest
import torch
from eff_attention import plain
from eff_attention.grounded_attention import PAIConfig, PAINTConfig, apply_paint
from eff_attention.grounded_attention import rule as paint_rule
from eff_attention.sink_calibration import ACTConfig, apply_act
from eff_attention.sink_calibration import rule as act_rule
from eff_attention.visual_sinks import VARConfig, apply_var
from eff_attention.visual_sinks import rule as var_rule
from eff_attention.visual_sinks.columns import Columns
from eff_kernels import native
from eff_kernels.edit.attention import AttentionCall, attend_explicit, dense, observe_attention
from eff_kernels.edit.caches import cache_kwargs, returned_cache

LONG = (1, 5, "P", *(6 + i % 80 for i in range(90)))


class Uses:
    """Counts calls of a function that stands in a module."""

    def __init__(self, monkeypatch, owner, name):
        self.count, self.plain = 0, getattr(owner, name)
        monkeypatch.setattr(owner, name, self)

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.plain(*args, **kwargs)


def read(model, inputs, steps):
    """Logits of a prompt and of the tokens after it."""
    out = model(**inputs, use_cache=True)
    found = [out.logits]
    for token in steps:
        out = model(input_ids=token[None, None], **cache_kwargs(model, returned_cache(out)), use_cache=True)
        found.append(out.logits)
    return torch.cat(found, 1)


def calibrated(model):
    """Layers for ACT: of a bfloat16 model one, as behind it means near the limit fall to the other side by rounding."""
    return (1,) if model.dtype == torch.bfloat16 else ":"


METHODS = {
    "VAR": (lambda m: apply_var(m, VARConfig(dims=(7,), tau=3.0, min_image_mass=0.0, rho=0.1)), var_rule, 1),
    "VAR, all rows": (
        lambda m: apply_var(m, VARConfig(dims=(7,), tau=3.0, min_image_mass=0.0, rho=0.1, rows="all")), var_rule, 1,
    ),
    "PAINT": (lambda m: apply_paint(m, PAINTConfig(spatial_ratio=0.1)), paint_rule, 2),
    "PAI": (lambda m: apply_paint(m, PAIConfig(alpha=0.6)), paint_rule, 2),
    "PAI, gains": (lambda m: apply_paint(m, PAIConfig(head_gain="attention_mass")), paint_rule, 2),
    "ACT": (lambda m: apply_act(m, ACTConfig(layers=calibrated(m), threshold=("relative", 2.0))), act_rule, 4),
    "ACT, first sink": (
        lambda m: apply_act(
            m, ACTConfig(layers=calibrated(m), threshold=("relative", 2.0), spare="first_sink", min_rows=3)
        ),
        act_rule, 4,
    ),
}  # fmt: skip

LONG_WAYS = {"VAR": "move_weights", "ACT": "scale_weights"}


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_answers_are_those_of_weights_in_the_open(zoo, method, dtype, bound, monkeypatch):
    model = zoo("Llava").to(dtype)
    inputs = zoo.ask("Llava", LONG)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    if method.startswith("VAR"):
        image = inputs["input_ids"][0].tolist().index(zoo.image)
        planted = model.model.language_model.layers[2].register_forward_pre_hook(
            lambda module, args, kwargs: _planted(args, kwargs, image), with_kwargs=True
        )
    apply, module, layers = METHODS[method]
    layers = 1 if method.startswith("ACT") and dtype == torch.bfloat16 else layers
    steps = torch.tensor([7, 9, 11])
    before = read(model, inputs, steps)
    single = Uses(monkeypatch, module, "row_calibrated" if method.startswith("ACT") else "answer_of_one")
    long = None if method.startswith("PA") else Uses(monkeypatch, module, LONG_WAYS[method[:3]])
    with apply(model):
        found = read(model, inputs, steps)
    assert single.count == layers * len(steps)
    with apply(model), observe_attention(model, lambda call, output: None):
        wanted = read(model, inputs, steps)
    assert single.count == layers * len(steps)
    # Prompts of float64 models have no compiled way.
    assert long is None or long.count == (0 if dtype == torch.float64 or native.unavailable() else layers)
    if method.startswith("VAR"):
        planted.remove()
    assert (found - wanted).norm() <= bound * wanted.norm()
    if dtype != torch.bfloat16:
        assert (found - before).norm() > 100 * (found - wanted).norm()


def _planted(args, kwargs, place):
    hidden = (args[0] if args else kwargs["hidden_states"]).clone()
    if hidden.shape[1] > 1:
        hidden[:, place, 7] += 2000.0
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


@torch.no_grad()
@pytest.mark.parametrize("first", [0, 40])
def test_columns_are_those_of_the_map(first):
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 80, 16, generator=random, dtype=torch.float64) for h in (4, 2, 2))
    call = AttentionCall(torch.nn.Identity(), "attention", 0, q, k, v, scale=0.3, causal=True)
    keys = torch.zeros(2, 80, dtype=torch.bool)
    keys[0, [3, 50]], keys[1, 7] = True, True
    few = Columns.of(call, keys, first)
    full = attend_explicit(call, weights=True)
    assert few.at.tolist() == [3, 7, 50]
    torch.testing.assert_close(few.weights, full.weights[:, :, first:, few.at])

    def edit(block, part):
        changed = block.clone()
        changed[:, :, first:, few.at] *= torch.tensor([0.5, 3.0, 0.0], dtype=block.dtype)
        return changed

    wanted = attend_explicit(call, edit_weights=edit).out
    base = dense(call).out
    found = few.changed(call, base, few.weights * torch.tensor([0.5, 3.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(found, wanted)
    assert torch.equal(few.changed(call, base, few.weights), base)


def test_what_is_not_plain_is_told():
    q, k = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 5, 8)
    call = AttentionCall(torch.nn.Identity(), "attention", 0, q, k, k, causal=True, offset=2)
    assert plain.is_plain(call)
    assert plain.obstacles(call.replace(softcap=3.0, dropout=0.1)) == "softcap, dropout"
    assert plain.obstacles(call.replace(q=q.clone().requires_grad_())) == "gradients"
    for change in ({"mask": torch.ones(3, 5) > 0}, {"window": 2}, {"offset": 0}, {"causal": False}, {"q": q[:0]}):
        assert not plain.is_plain(call.replace(**change))
    assert plain.is_plain(call.replace(q=q[:, :, :1], causal=False))
