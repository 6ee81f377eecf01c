"""The committed checkpoint: loads, leaves text to SmolLM2 bit for bit, and scores as its record says."""

import pytest
import torch
from eff_embedded import collages
from eff_embedded.checkpoints import checkpoint
from eff_embedded.eyes import SMOLLM2_EYES, PictureEncoder, checkpoint_file, load_smollm2_eyes, pixels, read_checkpoint
from eff_embedded.eyes.evaluation import evaluate
from eff_embedded.eyes.load import fill
from eff_embedded.eyes.scores import answers
from eff_embedded.language import load_smollm2
from PIL import Image


@pytest.fixture(scope="module")
def loaded():
    return load_smollm2_eyes()


def test_it_is_transformers_own_class(loaded):
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    model, processor = loaded
    assert type(model) is LlavaForConditionalGeneration
    assert type(processor) is LlavaProcessor
    assert not model.training


def test_text_alone_is_smollm2_bit_for_bit(loaded):
    model, processor = loaded
    plain, _ = load_smollm2()
    ids = processor.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_the_encoder_alone_gives_the_same_embeddings(loaded):
    model, _ = loaded
    picture = collages.sample(1).picture
    encoder = PictureEncoder(*read_checkpoint(checkpoint_file()), vision=model.model.vision_tower)
    with torch.inference_mode():
        seen = model.get_image_features(pixel_values=pixels(picture)[None]).pooler_output[0]
    torch.testing.assert_close(encoder([Image.fromarray(picture)])[0], seen, atol=1e-4, rtol=1e-4)


def test_another_models_weights_are_refused(loaded, tmp_path):
    from safetensors.torch import save_file

    model, _ = loaded
    _, weights = read_checkpoint(checkpoint_file())
    first = next(iter(weights))
    with pytest.raises(ValueError, match="names differ"):
        fill(model, {n: t for n, t in weights.items() if n != first})
    with pytest.raises(ValueError, match="the model wants"):
        fill(model, {**weights, first: weights[first][..., :2].contiguous()})
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a checkpoint of SmolLM2 with eyes"):
        read_checkpoint(tmp_path / "other.safetensors")


@pytest.mark.slow
def test_scores_are_those_of_the_record(loaded):
    model, processor = loaded
    found = evaluate(
        lambda asked: answers(model, processor.tokenizer, asked, max_tokens=24),
        pictures=10,
        worlds=("contrary", "crowded contrary"),
    )
    recorded = checkpoint(SMOLLM2_EYES).record["scores"]
    for world, figures in found.items():
        for name in ("yes_no", "recall", "chair_i"):
            # A few dozens of answers against hundreds: three deviations of the smaller sample.
            here, there = figures[name], recorded[world][name]
            spread = 3 * (max(there["value"] * (1 - there["value"]), 0.04) / here["n"]) ** 0.5
            assert abs(here["value"] - there["value"]) < spread, (world, name, here, there)
    assert found["contrary"]["yes_no"]["value"] > 0.8
