"""Reaching one of three targets past an obstacle in the plane: states, an analytic expert, closed-loop episodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

STEP, RADIUS, REACHED = 0.07, 0.22, 0.08
CHUNK, EXECUTED, MAX_STEPS = 8, 4, 48
NOISE = 0.005  # of every coordinate that a policy sees


@dataclass
class Scenes:
    """A batch of scenes: agent [B, 2], targets [B, 3, 2], goal [B] (which target), obstacle [B, 2]."""

    agent: Tensor
    targets: Tensor
    goal: Tensor
    obstacle: Tensor

    @property
    def goal_position(self) -> Tensor:
        return self.targets[torch.arange(len(self.goal)), self.goal]

    def observe(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """What a policy gets: targets, obstacle and agent [B, 5, 2] with noise, and the instruction."""
        points = torch.cat([self.targets, self.obstacle[:, None], self.agent[:, None]], 1)
        return {"points": points + NOISE * torch.randn(points.shape, generator=generator), "goal": self.goal}


def scenes(count: int, generator: torch.Generator, *, between: float = 0.7) -> Scenes:
    """Random scenes; in a share ``between`` of them the obstacle is near the straight way."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * 1.8 - 0.9

    agent, targets, obstacle = draw(count, 2), draw(count, 3, 2), draw(count, 2)
    goal = torch.randint(0, 3, (count,), generator=generator)
    result = Scenes(agent, targets, goal, obstacle)
    middle = (agent + result.goal_position) / 2 + 0.1 * torch.randn(count, 2, generator=generator)
    on_the_way = torch.rand(count, 1, generator=generator) < between
    result.obstacle = torch.where(on_the_way, middle, obstacle)
    result.agent = _outside(agent, result.obstacle)
    result.targets[torch.arange(count), goal] = _outside(result.goal_position, result.obstacle)
    return result


def _outside(point: Tensor, obstacle: Tensor) -> Tensor:
    away = point - obstacle
    distance = away.norm(dim=1, keepdim=True)
    return point + away / distance.clamp_min(1e-3) * (RADIUS + 0.12 - distance).clamp_min(0)


def expert_step(agent: Tensor, goal: Tensor, obstacle: Tensor) -> Tensor:
    """One step [B, 2] towards the goal, round the obstacle on the nearer side."""
    to_goal = goal - agent
    distance = to_goal.norm(dim=1, keepdim=True)
    u = to_goal / distance.clamp_min(1e-6)
    away = agent - obstacle
    gap = away.norm(dim=1, keepdim=True)
    n = away / gap.clamp_min(1e-6)
    ahead = ((-away * u).sum(1, keepdim=True) > 0).float()
    near = ((RADIUS + 0.22 - gap) / 0.18).clamp(0, 1)
    cross = n[:, :1] * u[:, 1:] - n[:, 1:] * u[:, :1]
    tangent = torch.stack([-n[:, 1], n[:, 0]], 1) * torch.where(cross >= 0, 1.0, -1.0)
    inward = (u * n).sum(1, keepdim=True).clamp_max(0)
    direction = u - near * inward * n + near * ahead * 0.8 * tangent
    direction = direction + n * ((RADIUS + 0.08 - gap) / 0.05).clamp(0, 1.5)
    direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-6)
    return direction * distance.clamp_max(STEP)


def expert_chunk(s: Scenes) -> Tensor:
    """The expert's next actions in units of ``STEP``, [B, CHUNK, 2]."""
    agent, goal, actions = s.agent.clone(), s.goal_position, []
    for _ in range(CHUNK):
        step = expert_step(agent, goal, s.obstacle)
        agent = agent + step
        actions.append(step / STEP)
    return torch.stack(actions, 1)


def episodes(
    act: Callable[[dict[str, Tensor], Tensor], Tensor], count: int, seed: int
) -> tuple[Tensor, Tensor, Scenes]:
    """Run episodes side by side; the same seed gives the same scenes, observation noise and starting noise.

    Args:
        act: Gives actions [B, CHUNK, 2] for an observation and noise [B, CHUNK, 2].
        count: How many.
        seed: Of all randomness.

    Returns:
        Success [B] (at the goal at the end, obstacle never touched), paths [B, MAX_STEPS + 1, 2], the scenes.
    """
    generator = torch.Generator().manual_seed(seed)
    s = scenes(count, generator)
    start = Scenes(s.agent.clone(), s.targets, s.goal, s.obstacle)
    touched = torch.zeros(count, dtype=torch.bool)
    path = [s.agent.clone()]
    for _ in range(MAX_STEPS // EXECUTED):
        observation = s.observe(generator)
        actions = act(observation, torch.randn(count, CHUNK, 2, generator=generator))
        for i in range(EXECUTED):
            step = actions[:, i] * STEP
            step = step / (step.norm(dim=1, keepdim=True) / (1.2 * STEP)).clamp_min(1)
            s.agent = s.agent + step
            touched |= (s.agent - s.obstacle).norm(dim=1) < RADIUS
            path.append(s.agent.clone())
    success = ((s.agent - s.goal_position).norm(dim=1) < REACHED) & ~touched
    return success, torch.stack(path, 1), start
