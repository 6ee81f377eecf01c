"""A small decoder of several families, and how the tests run it."""

import functools

import pytest
import torch
from eff_attention.layer_reuse import LayerReusePolicy
from eff_kernels.edit.caches import cache_kwargs

LAYERS = 6


@pytest.fixture
def policy():
    """From a text: "A" anchor, "F" full, a digit reuses that layer."""

    def read(text):
        kind = tuple({"A": "anchor", "F": "full"}.get(c, "reuse") for c in text)
        source = tuple(int(c) if c.isdigit() else -1 for c in text)
        return LayerReusePolicy(kind=kind, source=source, score=0.0, meta={})

    return read


@pytest.fixture
def mixed(policy):
    return policy("FA11A4")


@functools.cache
def models():
    import transformers

    made = {}
    for name in ("Llama", "Qwen2", "Qwen3", "Mistral"):
        torch.manual_seed(0)
        extra = {"sliding_window": None} if name == "Mistral" else {}
        settings = getattr(transformers, f"{name}Config")(
            hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, vocab_size=101, max_position_embeddings=1024, initializer_range=0.2,
            attn_implementation="sdpa", **extra,
        )  # fmt: skip
        made[name] = getattr(transformers, f"{name}ForCausalLM")(settings).eval()
    return made


@pytest.fixture(params=["Llama", "Qwen2", "Qwen3", "Mistral"])
def any_model(request):
    return models()[request.param]


@pytest.fixture
def model():
    return models()["Llama"]


@pytest.fixture
def decode():
    """Logits of the last ``steps`` tokens, each decoded by itself after the others as a prompt."""

    @torch.no_grad()
    def run(model, tokens, steps=4, mask=None, cache=None):
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config) if cache is None else cache
        prompt = tokens.size(1) - steps
        mask = torch.ones_like(tokens) if mask is None else mask
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = []
        for first, last in [(0, prompt), *((i, i + 1) for i in range(prompt, tokens.size(1)))]:
            out = model(
                tokens[:, first:last], attention_mask=mask[:, :last], position_ids=positions[:, first:last],
                **cache_kwargs(model, cache),
            )  # fmt: skip
            logits.append(out.logits[:, -1])
        return torch.stack(logits[1:], 1)

    return run


@pytest.fixture
def prompt():
    return lambda batch=1, length=200: torch.randint(
        0, 101, (batch, length), generator=torch.Generator().manual_seed(1)
    )
