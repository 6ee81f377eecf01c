"""A tiny DiT, a tiny Dinov2 whose patches are as many as its tokens, and a config for both."""

import pytest
import torch
from eff_guidance.alignment import HolisticAlignment, HolisticAlignmentConfig, TeacherAdapter


def dit(layers=5, heads=3, seed=0, size=8, **more):
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=layers,
        sample_size=size, patch_size=2, num_embeds_ada_norm=10, **more,
    )  # fmt: skip
    for p in model.parameters():
        if p.detach().count_nonzero() == 0:
            torch.nn.init.normal_(p, std=0.02)
    return model.eval()  # without dropout of labels: runs can be compared


def dinov2(layers=4, heads=4, seed=1, registers=0):
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(seed)
    known = {
        "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": heads, "patch_size": 14,
        "image_size": 56, "initializer_range": 0.2,
    }  # fmt: skip
    if registers:
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**known, num_register_tokens=registers))
    return Dinov2Model(Dinov2Config(**known))


CONFIG = HolisticAlignmentConfig(
    feature_layer=2, attention_pairs=((1, 2), (2, 3)), heads=2, teacher_dim=32, projector_dim=16, lambda_attention=0.25
)


class Setting:
    """``setting.dit()``, ``.teacher()``, ``setting.aligned(...)``, ``setting.batch()``, ``setting.run(...)``."""

    config = CONFIG
    dit = staticmethod(dit)
    dinov2 = staticmethod(dinov2)

    @staticmethod
    def teacher(**settings):
        return TeacherAdapter(dinov2(**settings), size=56)

    @staticmethod
    def aligned(student, config=CONFIG, trigger=None, teacher="own", **settings):
        teacher = Setting.teacher(**settings) if teacher == "own" else teacher
        torch.manual_seed(7)
        return HolisticAlignment(student, teacher, config, trigger=trigger)

    @staticmethod
    def batch(seed=0, count=3, size=8):
        draw = torch.Generator().manual_seed(seed)
        pictures = torch.randint(256, (count, 3, 64, 64), generator=draw, dtype=torch.uint8)
        clean, noise = torch.randn(2, count, 4, size, size, generator=draw)
        t = torch.rand(count, generator=draw)
        return {"pictures": pictures, "clean": clean, "noise": noise, "t": t, "labels": torch.arange(count) % 10}

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
