"""A tiny DiT and what it is trained on."""

import pytest
import torch
from eff_guidance.memory_bank import RepulsiveAlignment, RepulsorConfig

CONFIG = RepulsorConfig(dim=6, queue_size=10, queue_dtype=torch.float32, warmup_steps=0)


def dit(layers=4, heads=2, seed=0, size=8):
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=layers,
        sample_size=size, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    for p in model.parameters():
        if p.detach().count_nonzero() == 0:
            torch.nn.init.normal_(p, std=0.02)
    return model.eval()  # without dropout of labels: runs can be compared


class Setting:
    """``setting.dit()``, ``.repulsion(student, **changes)``, ``.batch(seed)``, ``.run(student, batch)``."""

    dit = staticmethod(dit)
    config = CONFIG

    @staticmethod
    def repulsion(student, trigger=None, dataset_size=None, **changes):
        torch.manual_seed(7)
        config = RepulsorConfig.from_dict({**CONFIG.to_dict(), **changes})
        return RepulsiveAlignment(student, config, trigger=trigger, dataset_size=dataset_size)

    @staticmethod
    def batch(seed=0, count=3):
        draw = torch.Generator().manual_seed(seed)
        clean, noise = torch.randn(2, count, 4, 8, 8, generator=draw)
        return {
            "clean": clean,
            "noise": noise,
            "t": torch.rand(count, generator=draw),
            "labels": torch.arange(count) % 10,
        }

    @staticmethod
    def run(student, batch):
        """The velocity's error."""
        t = batch["t"].view(-1, 1, 1, 1).to(batch["clean"])
        noisy = (1 - t) * batch["clean"] + t * batch["noise"]
        found = student(noisy, timestep=batch["t"] * 1000, class_labels=batch["labels"]).sample
        return (found - (batch["noise"] - batch["clean"])).square().mean()


@pytest.fixture
def setting():
    return Setting
