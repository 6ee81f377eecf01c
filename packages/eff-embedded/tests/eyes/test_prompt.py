"""Pixels and prompts: the same as transformers' own preparation, and as SmolLM2's own chat template."""

import numpy as np
import pytest
import torch
from eff_embedded.eyes import PICTURE_TOKEN, PICTURE_TOKEN_ID, EyesConfig, load_processor, pixels, prompt
from PIL import Image


@pytest.fixture(scope="module")
def processor():
    return load_processor(EyesConfig())


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(128, 128), (126, 126), (300, 200), (40, 500)])
def test_pixels_equal_the_processors(processor, size):
    picture = noise(*size)
    ours = pixels(picture)
    theirs = processor.image_processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
    assert ours.shape == (3, 126, 126)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def test_pictures_of_every_mode_and_what_is_transparent_is_white():
    white = pixels(Image.new("RGB", (20, 20), "white"))
    assert torch.equal(pixels(Image.new("RGBA", (20, 20), (255, 0, 0, 0))), white)
    assert torch.equal(pixels(Image.new("LA", (20, 20), (0, 0))), white)
    for mode in ("1", "L", "P", "CMYK", "I;16"):
        assert pixels(Image.new(mode, (20, 20))).shape == (3, 126, 126)


def test_chats_of_text_are_laid_out_as_smollm2_does(processor):
    from eff_embedded.language import smollm2_folder
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    chats = [
        [{"role": "user", "content": "Hello"}],
        [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}],
        [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}],
    ]
    for chat in chats:
        for opens in (True, False):
            options = {"tokenize": False, "add_generation_prompt": opens}
            assert processor.apply_chat_template(chat, **options) == tokenizer.apply_chat_template(chat, **options)


def test_the_processor_makes_the_prompt_of_the_training(processor):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a dog?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=[Image.fromarray(noise(128, 128))], text=text, return_tensors="pt")
    expected = processor.tokenizer(prompt("Is there a dog?", 81), add_special_tokens=False).input_ids
    assert inputs["input_ids"][0].tolist() == expected
    assert expected.count(PICTURE_TOKEN_ID) == 81
    assert processor.tokenizer.convert_tokens_to_ids(PICTURE_TOKEN) == PICTURE_TOKEN_ID


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"picture_size": 128}, "picture_size=128 must be a multiple of 14"),
        ({"layers": ()}, r"layers=\(\) must name layers"),
        ({"layers": (0, 8)}, "from 1 to 12"),
        ({"rank": 0}, "rank=0 must be 1 or more"),
    ],
)
def test_config_refuses(settings, words):
    with pytest.raises(ValueError, match=words):
        EyesConfig(**settings)
