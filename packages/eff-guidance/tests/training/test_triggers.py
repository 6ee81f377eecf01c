"""Triggers and the cosine of gradients."""

import pytest
import torch
from eff_guidance.training import FixedStepTrigger, GradientAngleTrigger, gradient_cosine


@pytest.fixture
def params():
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=draw).requires_grad_(), torch.randn(5, generator=draw).requires_grad_()]


def test_cosine_of_gradients(params):
    a, b = params
    one = (a.square().sum() + b.sin().sum()) * 2
    two = a.exp().sum() + (b * torch.arange(5.0)).sum()
    assert gradient_cosine(one, one, params) == pytest.approx(1, abs=1e-12)
    assert gradient_cosine(one, -3 * one, params) == pytest.approx(-1, abs=1e-12)
    assert gradient_cosine(a.square().sum(), b.square().sum(), params) == 0
    assert gradient_cosine(one, two.detach(), params) == 0
    flat = [torch.cat([g.flatten() for g in torch.autograd.grad(x, params, retain_graph=True)]) for x in (one, two)]
    wanted = torch.nn.functional.cosine_similarity(*(f.double() for f in flat), dim=0).item()
    assert gradient_cosine(one, two, params) == pytest.approx(wanted, abs=1e-12)
    assert gradient_cosine(one, two, [a, a, b, b]) == pytest.approx(wanted, abs=1e-12)
    assert a.grad is None
    assert b.grad is None
    (one + two).backward()  # both graphs are still there


def test_a_fixed_step_fires_once_and_for_good():
    trigger = FixedStepTrigger(3)
    assert [trigger.update(s) for s in (0, 1, 2, 3, 4, 0)] == [False, False, False, True, True, True]
    other = FixedStepTrigger(9)
    other.load_state_dict(trigger.state_dict())
    assert other.update(0)
    assert FixedStepTrigger(0).update(0)
    with pytest.raises(ValueError, match="step=-1"):
        FixedStepTrigger(-1)


def closure_of(params, angles):
    """Two losses whose gradients have the next of some cosines at each look, the same at all noise levels."""
    asked = []

    def closure(t):
        asked.append(t)
        cosine = angles[(len(asked) - 1) // 2]
        first = params[1][0]
        return first, cosine * first + (1 - cosine**2) ** 0.5 * params[1][1]

    return closure, asked


def test_the_angle_is_looked_at_when_due_and_ends_it(params):
    settings = {"start": 5, "every": 3, "threshold": -0.05, "timesteps": (0.1, 0.8)}
    trigger = GradientAngleTrigger(params, **settings)
    closure, asked = closure_of(params, [0.5, -0.04, -0.06])
    fired = []
    for step in range(14):
        if step == 9:  # the state carries on in another one
            state = trigger.state_dict()
            trigger = GradientAngleTrigger(params, **settings)
            trigger.load_state_dict(state)
        fired.append(trigger.update(step, closure))
    assert fired == [False] * 11 + [True] * 3
    assert asked == [0.1, 0.8] * 3
    assert [step for step, _ in trigger.history] == [5, 8, 11]
    assert [angle for _, angle in trigger.history] == pytest.approx([0.5, -0.04, -0.06], abs=1e-6)
    assert trigger.update(0)
    assert all(p.grad is None for p in params)
    late = GradientAngleTrigger(params, **settings)
    late.update(7, closure_of(params, [0.5])[0])  # a missed look is made up for once
    assert late.due == 8


def test_refusals(params):
    with pytest.raises(ValueError, match="no closure"):
        GradientAngleTrigger(params, start=0).update(0)
    with pytest.raises(ValueError, match="0 parameters"):
        GradientAngleTrigger([])
    with pytest.raises(ValueError, match="every=0"):
        GradientAngleTrigger(params, every=0)
