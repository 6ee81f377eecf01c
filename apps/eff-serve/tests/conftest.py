"""The embedded model, converted once a session, and tiny random models of each architecture."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from eff_embedded.language import smollm2_folder
from eff_serve.models.tokenizer import Tokenizer

with warnings.catch_warnings():
    # transformers imports torchao where it is installed, whose docstrings do not compile without warnings
    warnings.simplefilter("ignore")
    if importlib.util.find_spec("torchao"):
        import torchao  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401


@pytest.fixture(scope="session")
def smollm2():
    """Folder of the converted SmolLM2; EFF_CACHE_DIR keeps it between sessions."""
    return smollm2_folder(progress=False)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2):
    return Tokenizer(smollm2)


TINY = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama-untied-biased": ("Llama", {"attention_bias": True, "rope_theta": 5e5}),
    "llama-rope-llama3": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama-rope-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": None}),
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """``tiny_model(name)`` saves a random model of a few thousand weights and returns its folder."""
    made = {}

    def make(name: str) -> Path:
        if name not in made:
            import transformers

            family, extra = TINY[name]
            settings = {
                "vocab_size": 131,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "tie_word_embeddings": False,
                "eos_token_id": 2,
                "bos_token_id": 1,
                "pad_token_id": 0,
                # ten times the usual spread: logits far enough apart that a wrong rotation or mask cannot hide
                "initializer_range": 0.2,
                **extra,
            }
            config = getattr(transformers, f"{family}Config")(**settings)
            torch.manual_seed(1)
            model = getattr(transformers, f"{family}ForCausalLM")(config)
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith(".bias") or "norm" in parameter_name:
                    torch.nn.init.normal_(parameter, 1.0 if "norm" in parameter_name else 0.0, 0.3)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = folder
        return made[name]

    make.names = tuple(TINY)
    return make
