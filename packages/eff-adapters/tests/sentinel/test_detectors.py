import pytest
import torch
from eff_adapters.sentinel import ZeroShotDetector


@pytest.fixture
def owl(tmp_path):
    """A tiny OWL-ViT with a tokenizer of characters, both random."""
    import json

    from transformers import (
        CLIPTokenizer,
        OwlViTConfig,
        OwlViTForObjectDetection,
        OwlViTImageProcessorPil,
        OwlViTProcessor,
    )

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["!", "<|startoftext|>", "<|endoftext|>", *letters, *[c + "</w>" for c in letters]]
    (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        vocab=str(tmp_path / "vocab.json"),
        merges=str(tmp_path / "merges.txt"),
        pad_token="<|endoftext|>",
        model_max_length=16,
    )
    size = {"height": 16, "width": 16}
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = OwlViTForObjectDetection(
        OwlViTConfig(
            text_config={**shape, "vocab_size": len(words), "max_position_embeddings": 16, "bos_token_id": 1,
                         "eos_token_id": 2, "pad_token_id": 2},
            vision_config={**shape, "image_size": 16, "patch_size": 8}, projection_dim=16,
        )
    ).eval()  # fmt: skip
    return model, OwlViTProcessor(OwlViTImageProcessorPil(size=size, crop_size=size), tokenizer)


def test_boxes_above_a_threshold_are_votes(owl, image):
    names = ["dog", "cat", "tree"]
    low, high = (ZeroShotDetector(*owl, threshold=t, template="a {}", batch_size=2) for t in (0.0, 1.0))
    assert low(image(), names) == dict.fromkeys(names, True)
    assert high(image(), names) == dict.fromkeys(names, False)


def test_grounding_dino():
    import numpy as np
    from PIL import Image
    from transformers import (
        BertConfig,
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessorPil,
        GroundingDinoProcessor,
        SwinConfig,
    )  # fmt: skip

    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", *letters, *["##" + c for c in letters]]
    backbone = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    text = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64,
    )  # fmt: skip
    parts = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    model = GroundingDinoForObjectDetection(
        GroundingDinoConfig(
            backbone_config=backbone, text_config=text, d_model=32, encoder_ffn_dim=16, decoder_ffn_dim=16,
            num_queries=8, **parts,
        )
    ).eval()  # fmt: skip
    size = {"height": 128, "width": 128}
    tokenizer = BertTokenizer(vocab={w: i for i, w in enumerate(words)})
    processor = GroundingDinoProcessor(GroundingDinoImageProcessorPil(size=size), tokenizer)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    names = ["dog", "tree", "hot dog"]
    for threshold, wanted in ((0.0, True), (1.0, False)):
        detector = ZeroShotDetector(model, processor, threshold=threshold, text_threshold=0.0, batch_size=2)
        assert detector(picture, names) == dict.fromkeys(names, wanted)


def test_each_name_is_asked_alone(owl, image):
    model, processor = owl
    texts = processor(images=[image()] * 2, text=[["a dog"], ["a tree"]], return_tensors="pt")
    with torch.no_grad():
        scores = model(**texts).logits.sigmoid().amax((1, 2))
    between = float(scores.mean())
    detector = ZeroShotDetector(model, processor, threshold=between, template="a {}")
    assert detector(image(), ["dog", "tree"]) == {"dog": bool(scores[0] > between), "tree": bool(scores[1] > between)}
    assert detector(image(), []) == {}


def test_wrong_detectors(owl, processor):
    with pytest.raises(TypeError, match="not the processor of a zero-shot"):
        ZeroShotDetector(owl[0], processor)
    with pytest.raises(ValueError, match="where the name goes"):
        ZeroShotDetector(*owl, template="dog")
