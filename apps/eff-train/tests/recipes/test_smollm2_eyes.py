"""The recipe of SmolLM2 with eyes: its forward pass against transformers' own, and what its samples hold."""

import numpy as np
import pytest
import torch
from eff_embedded import collages
from eff_embedded.eyes.lora import ARGUMENT, PictureLinear, add_lora
from eff_train.recipes.smollm2_eyes import Config
from eff_train.recipes.smollm2_eyes.data import Packer, answer_text, config_of, patch_names, turns_of
from eff_train.recipes.smollm2_eyes.forward import Forward, answer_loss
from eff_train.recipes.smollm2_eyes.model import patch_loss

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
OPENING = [5, 6, 7]


@pytest.fixture(scope="module")
def language():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    ).eval()
    model.requires_grad_(False)
    add_lora(model.model, TARGETS, 4)
    for module in model.modules():
        if isinstance(module, PictureLinear):
            torch.nn.init.normal_(module.lora_b, std=0.3)
    return model


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(8, 64, (2, 3, 10), generator=generator)
    turns = torch.tensor([[0] * 4 + [1] * 6, [2] * 10, [3] * 5 + [-1] * 5]).expand(2, -1, -1)
    places = torch.tensor([[*range(4), *range(6)], [*range(10)], [*range(5), 0, 0, 0, 0, 0]]).expand(2, -1, -1)
    return torch.randn(2, 9, 48, generator=generator), tokens, places, turns


def alone(language, picture, tokens):
    """Hidden states of one turn about one picture, by transformers."""
    embed = language.model.embed_tokens
    embedded = torch.cat([embed(torch.tensor(OPENING)), picture, embed(tokens)])[None]
    behind = (torch.arange(embedded.shape[1]) >= len(OPENING))[None]
    return language.model(inputs_embeds=embedded, **{ARGUMENT: behind}).last_hidden_state[0, -len(tokens) :]


def test_every_turn_is_computed_as_if_alone(language, batch):
    picture, tokens, places, turns = batch
    hidden = Forward(language.model, OPENING, compiled=False)(picture, tokens, places, turns)
    for b, row, turn in [(0, 0, 0), (0, 0, 1), (1, 1, 2), (1, 2, 3)]:
        at = turns[b, row] == turn
        torch.testing.assert_close(
            hidden[b, row][at], alone(language, picture[b], tokens[b, row][at]), atol=2e-5, rtol=1e-4
        )


def test_gradients_equal_transformers(language, batch):
    picture, tokens, places, turns = batch
    trained = [p for n, p in language.named_parameters() if ".lora_" in n]
    seen = picture.clone().requires_grad_()
    at = turns[1, 0] == 1
    ours = Forward(language.model, OPENING, compiled=False)(seen, tokens, places, turns)[1, 0][at].square().sum()
    expected = alone(language, seen[1], tokens[1, 0][at]).square().sum()
    for got, wanted in zip(*(torch.autograd.grad(x, [seen, *trained]) for x in (ours, expected)), strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-3, rtol=1e-3)


def test_only_tokens_of_answers_have_loss():
    hidden, head = torch.randn(1, 1, 4, 8), torch.nn.Linear(8, 16, bias=False)
    tokens = torch.tensor([[[1, 2, 3, 4]]])
    answers = torch.tensor([[[False, True, True, False]]])
    loss, hit = answer_loss(hidden, head, tokens, answers)
    expected = torch.nn.functional.cross_entropy(head(hidden[0, 0, 1:3]), torch.tensor([3, 4]))
    torch.testing.assert_close(loss, expected)
    assert 0 <= hit <= 1


def encode(text):
    return list(text.encode())


def test_rows_hold_whole_turns_and_mark_the_answers():
    packer = Packer(encode, rows=2, length=90, end=0)
    turns = [("Is there a dog?", "Yes."), ("How many?", "Two."), ("x" * 99, "too long for a row")]
    tokens, places, numbers, answers = packer(turns)
    for number, (question, answer) in enumerate(turns[:2]):
        at = numbers == number
        text = bytes(tokens[at].tolist())
        assert text == f"\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}".encode() + b"\0"
        told = tokens.roll(-1, -1)[at & answers]
        assert bytes(told.tolist()) == answer.encode() + b"\0"
        assert places[at].tolist() == list(range(len(text)))
    assert set(numbers.unique().tolist()) == {-1, 0, 1}


def test_turns_ask_for_yes_and_no_equally_often_and_answers_are_right():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        collage = collages.sample(seed, config_of(rng, 0.4))
        told = [answer for _, answer in turns_of(collage, rng)]
        assert told.count("Yes.") == told.count("No.")
        named = {m.name for m in collages.find(told[0]) if not m.is_class}
        assert named == set(collage.names)


def test_answers_are_sentences():
    collage = collages.sample(3, collages.CollageConfig(objects=(3, 4)))
    said = {q.kind: answer_text(q) for q in collage.questions()}
    assert said["exists"] in ("Yes.", "No.")
    assert all(text[0].isupper() and text.endswith(".") for text in said.values())
    assert all(text.startswith("The ") for kind, text in said.items() if kind in ("which", "front", "bigger"))


def test_patches_are_named_after_what_they_show():
    collage = collages.sample(4, collages.CollageConfig(objects=(1, 1), object_size=(0.45, 0.45)))
    names = patch_names(collage, 126).view(9, 9)
    number = list(collages.things()).index(collage.names[0])
    assert set(names.unique().tolist()) == {-1, number, len(collages.things())}
    x0, y0, x1, y1 = collage.boxes[0]
    assert names[int((y0 + y1) / 2 / 128 * 9), int((x0 + x1) / 2 / 128 * 9)] == number


def test_the_loss_of_patches_is_least_at_the_words():
    words = torch.randn(5, 16)
    names = torch.tensor([[0, 3, -1, 4]])
    right, hit = patch_loss(words[names.clamp(min=0)], names, words)
    wrong, missed = patch_loss(words[torch.tensor([[1, 2, 0, 4]])], names, words)
    assert right < wrong
    assert (float(hit), float(missed)) == (1.0, 0.0)


def test_config_refuses():
    with pytest.raises(ValueError, match="patch_steps=10 must be fewer than steps=10"):
        Config(steps=10, patch_steps=10, warmup=1)
    with pytest.raises(ValueError, match="judged=3 must be a multiple of batch_size=2"):
        Config(batch_size=2, judged=3)
