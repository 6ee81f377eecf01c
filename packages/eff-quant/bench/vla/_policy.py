"""A small vision-language-action policy of real classes: Llama reads the scene, diffusers blocks denoise."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from _task import CHUNK, Scenes, expert_chunk, scenes
from torch import Tensor, nn

WIDTH, EULER_STEPS, BLOCKS = 128, 8, 4
FREQUENCIES = (1.0, 2.0, 4.0, 8.0)
WEIGHTS = Path(__file__).parent / "policy.safetensors"


class Policy(nn.Module):
    """Flow matching: from noise to a chunk of actions in eight Euler steps, given a scene of six tokens."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.attention import BasicTransformerBlock
        from transformers import LlamaConfig, LlamaModel

        self.instruction = nn.Embedding(3, WIDTH)
        inputs = 2 + 4 * len(FREQUENCIES)
        self.point = nn.Sequential(nn.Linear(inputs, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.kind = nn.Parameter(torch.randn(5, WIDTH) * 0.5)
        config = LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=8,
        )
        self.language_model = LlamaModel(config)
        self.action_in = nn.Linear(2, WIDTH)
        self.position = nn.Parameter(torch.randn(CHUNK, WIDTH) * 0.5)
        self.time = nn.Sequential(nn.Linear(32, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                dim=WIDTH,
                num_attention_heads=4,
                attention_head_dim=WIDTH // 4,
                cross_attention_dim=WIDTH,
                attention_bias=True,
                activation_fn="gelu-approximate",
            )
            for _ in range(BLOCKS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.action_out = nn.Linear(WIDTH, 2)

    def encode(self, points: Tensor, goal: Tensor) -> Tensor:
        """Features of a scene, [B, 6, WIDTH]."""
        points = torch.cat([points[:, :4] - points[:, 4:], points[:, 4:]], 1)  # seen from the agent
        angles = torch.cat([f * points for f in FREQUENCIES], -1)
        points = self.point(torch.cat([points, angles.sin(), angles.cos()], -1)) + self.kind
        tokens = torch.cat([self.instruction(goal)[:, None], points], 1)
        return self.language_model(inputs_embeds=tokens, use_cache=False).last_hidden_state

    def denoised(self, features: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        """The end of the flow through actions [B, CHUNK, 2] at times [B]; its velocity is (end - here) / (1 - t)."""
        angles = t[:, None] * torch.exp(torch.linspace(0, math.log(100.0), 16))
        x = self.action_in(actions) + self.position + self.time(torch.cat([angles.sin(), angles.cos()], 1))[:, None]
        for block in self.transformer_blocks:
            x = block(x, encoder_hidden_states=features)
        return self.action_out(self.norm(x))

    def forward(self, points: Tensor, goal: Tensor, noise: Tensor) -> Tensor:
        """Actions [B, CHUNK, 2]: all eight steps from ``noise``."""
        features, actions = self.encode(points, goal), noise
        for i in range(EULER_STEPS):
            t = torch.full((len(actions),), i / EULER_STEPS)
            actions = actions + (self.denoised(features, actions, t) - actions) / (EULER_STEPS - i)
        return actions


def load() -> Policy:
    """The trained policy."""
    from safetensors.torch import load_file

    policy = Policy()
    policy.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})
    return policy.eval()


def observations(count: int, seed: int) -> Scenes:
    """Scenes as a policy meets them at a start, to calibrate with and to compare actions on."""
    return scenes(count, torch.Generator().manual_seed(seed))


def training_batch(count: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Observations anywhere in the plane and what the expert does there."""
    s = scenes(count, generator)
    # Half of the agents are somewhere on the way, where a policy spends its time.
    share = torch.rand(count, 1, generator=generator) * (torch.rand(count, 1, generator=generator) < 0.5)
    s.agent = s.agent + share * (s.goal_position - s.agent) + 0.15 * share * torch.randn(count, 2, generator=generator)
    return s.observe(generator), expert_chunk(s)
