"""A tiny Llama that has learnt something, and sweeps by brute force to compare with."""

import copy
import random

import pytest
import torch
from eff_quant.sensitivity.fake import FORMATS
from eff_quant.sensitivity.score import score
from torch import nn

CHANNEL_GAIN = 50.0


def text_tokens():
    """100 kB of sentences of invented words, the same on every machine and under every Python."""
    draw = random.Random(0)
    syllables = [c + v + e for c in "bdfgklmnprst" for v in "aeiou" for e in ("", "n", "r", "st")]
    words = ["".join(draw.choices(syllables, k=draw.choice((1, 2, 2, 3)))) for _ in range(600)]
    common = [1 / (rank + 3) for rank in range(len(words))]  # Zipf's law
    sentences = (" ".join(draw.choices(words, common, k=draw.randint(4, 12))) for _ in range(2200))
    return torch.tensor(list((".\n".join(sentences)).encode()))


@pytest.fixture(scope="session")
def trained_once():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    model, tokens = LlamaForCausalLM(config), text_tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(150):
        at = torch.randint(len(tokens) - 65, (8,))
        batch = torch.stack([tokens[a : a + 65] for a in at.tolist()])
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 3.1  # 5.5 before training
    return model.eval()


@pytest.fixture
def trained(trained_once):
    """A copy of it that a test may change."""
    return copy.deepcopy(trained_once)


@pytest.fixture(scope="session")
def windows():
    """Three windows of text, the last one shorter."""
    tokens = text_tokens()
    return [tokens[1000:1100], tokens[50_000:50_100], tokens[90_000:90_070]]


@pytest.fixture
def plant():
    """Make one channel in 16 of what enters block 1's down_proj 50 times as large; the model computes the same.

    Every block of both formats holds one, so that whatever the training made of the model, no layer is hit harder.
    """

    def change(model):
        mlp = model.model.layers[1].mlp
        strength = mlp.up_proj.weight.norm(dim=1) * mlp.down_proj.weight.norm(dim=0)
        channels = strength.view(-1, 16).argmax(1) + torch.arange(0, len(strength), 16)
        with torch.no_grad():
            mlp.up_proj.weight[channels] *= CHANNEL_GAIN
            mlp.down_proj.weight[:, channels] /= CHANNEL_GAIN
        return model

    return change


@pytest.fixture
def brute_force():
    """Score a copy of a model whose named layers have rounded weights and, by hooks, rounded inputs."""

    @torch.no_grad()
    def run(model, windows, formats, *, weights=True, activations=True):
        changed = copy.deepcopy(model).eval()
        for name, format in formats.items():
            layer, fake = changed.get_submodule(name), FORMATS[format].round
            if weights:
                transposed = not isinstance(layer, nn.Linear)
                layer.weight.copy_(fake(layer.weight.T).T if transposed else fake(layer.weight))
            if activations:
                layer.register_forward_pre_hook(lambda module, args, fake=fake: fake(args[0]))
        found = [score(changed(w[None]).logits[0], model(w[None]).logits[0], w) for w in windows]
        return [v for s in found for v in s.nll], [v for s in found for v in s.kl]

    return run
