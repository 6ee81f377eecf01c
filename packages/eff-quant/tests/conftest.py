"""Tiny models of real architecture classes, made anew for each test."""

import contextlib
import importlib
import sys
import warnings

import pytest
import torch

# Importing these warns about their own dependencies (deprecations), which is nothing that a test here is about.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in ("transformers", "transformers.models.auto", "bitsandbytes", "peft"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
            if name == "transformers":
                sys.modules[name].LlamaForCausalLM  # noqa: B018 - the import behind it is made on first use
                sys.modules[name].utils.logging.disable_progress_bar()


@pytest.fixture
def llama():
    """A function that makes a Llama of two layers, 64 wide, with the same random weights each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(dtype=torch.float32, **changes):
        torch.manual_seed(1)
        values = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 256,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
        }
        return LlamaForCausalLM._from_config(LlamaConfig(**{**values, **changes}), dtype=dtype).eval()

    return make


@pytest.fixture
def ids():
    """Two sequences of twelve tokens."""
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(2))
