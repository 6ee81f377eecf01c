"""Attention modules of several libraries behind one interface, and a toy policy."""

import math

import pytest
import torch
from torch import nn

HEADS, DIM, WIDTH = 4, 8, 32


class Plain(nn.Module):
    """Attention as people write it: separate projections, softmax by hand or torch's function."""

    def __init__(self, bias=True, fused=True):
        super().__init__()
        self.num_heads = HEADS
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(4))
        self.fused = fused

    def forward(self, x, context=None, mask=None):
        source = x if context is None else context
        q, k, v = (
            p(t).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
            for p, t in ((self.q, x), (self.k, source), (self.v, source))
        )
        if self.fused:
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            logits = q @ k.mT / math.sqrt(DIM)
            if mask is not None:
                logits = logits.masked_fill(~mask, float("-inf"))
            y = logits.softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.fixture
def plain():
    """A function that makes a model with one plain attention module, ``attn``, the same each time."""

    def make(**options):
        torch.manual_seed(3)
        return nn.ModuleDict({"attn": Plain(**options)}).eval()

    return make


@pytest.fixture
def diffusers_attention():
    """A function that makes diffusers' ``Attention`` of four heads, with random weights and norms."""

    def make(**options):
        from diffusers.models.attention_processor import Attention

        torch.manual_seed(3)
        attention = Attention(query_dim=WIDTH, heads=HEADS, dim_head=DIM, **{"bias": True, **options})
        for p in attention.parameters():
            nn.init.normal_(p, std=0.3)
        return nn.ModuleDict({"attn": attention}).eval()

    return make


@pytest.fixture
def tokens():
    """Three batches of two sequences of eleven tokens."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 11, WIDTH, generator=generator) * (1 + i) for i in range(3)]
