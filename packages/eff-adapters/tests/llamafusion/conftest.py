import copy

import pytest
import torch


@pytest.fixture
def tiny():
    """``tiny(kind, **config)``: a small text model of transformers and nothing else."""
    import transformers

    def make(kind="Llama", **more):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(
            **{
                "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
                "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.2, "max_position_embeddings": 256,
                **more,
            }
        )  # fmt: skip
        return getattr(transformers, f"{kind}ForCausalLM")(config).eval()

    return make


@pytest.fixture
def config():
    """``config(**changes)``: a tower for latents 2 x 4 x 4 as four tokens."""
    from eff_adapters.llamafusion import ModalityTowerConfig

    def make(**more):
        return ModalityTowerConfig(
            **{
                "boi_token_id": 64, "eoi_token_id": 65, "patchify": "linear", "latent_channels": 2, "latent_size": 4,
                "tokens_per_image": 4, **more,
            }
        )  # fmt: skip

    return make


@pytest.fixture
def tower(tiny, config):
    """``tower(kind, **changes)``: a tower whose picture weights have left those of text."""
    from eff_adapters.llamafusion import add_modality_tower

    def make(kind="Llama", model=None, stir=True, **more):
        mm = add_modality_tower(tiny(kind) if model is None else model, config(**more)).eval()
        if stir:
            torch.manual_seed(1)
            with torch.no_grad():
                for p in mm.picture_parameters().values():
                    p.add_(0.1 * torch.randn_like(p))
        return mm

    return make


@pytest.fixture
def batch(config):
    """``batch(side)``: two rows, a caption before its picture, and a picture before its caption."""
    from eff_adapters.llamafusion import pack

    def make(side="right", rows=(0, 1), **more):
        g = torch.Generator().manual_seed(5)
        pictures = torch.randn(3, 2, 4, 4, generator=g)
        samples = [
            [torch.tensor([1, 5, 6, 7]), pictures[0], torch.tensor([2])],
            [pictures[1], torch.tensor([8, 9, 10, 11, 12, 2])],
            [torch.tensor([1, 9]), pictures[0], torch.tensor([4, 5]), pictures[2], torch.tensor([2])],
        ]
        return dict(pack([samples[i] for i in rows], config(**more), padding_side=side))

    return make


@pytest.fixture
def fixed():
    """Time steps and noise for a number of pictures."""

    def make(count=2, **more):
        g = torch.Generator().manual_seed(9)
        times = torch.randint(0, 1000, (count,), generator=g)
        return {"timesteps": times, "noise": torch.randn(count, 2, 4, 4, generator=g), **more}

    return make


@pytest.fixture
def copies():
    return copy.deepcopy
