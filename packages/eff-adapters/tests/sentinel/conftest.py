import pytest
import torch

WORDS = ["a", "the", "dog", "cat", "bone", "tree", "table", "chairs", "chair"]
WORDS += ["and", "is", "are", "on", "has", "near", "there", "with", "man", "of"]


@pytest.fixture(scope="session")
def processor():
    """A processor of words, punctuation and 8 x 8 pictures, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<image>", "user:", "assistant:", "?"]
    vocabulary = {w: i for i, w in enumerate([*special, ".", ",", *WORDS, *[w.capitalize() for w in WORDS], "<unk>"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>", "user:", "assistant:"],
    )  # fmt: skip
    template = (
        "<s>{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}<image> {% else %}{{ p['text'] }}{% endif %}{% endfor %}"
        "{% if m['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    )
    size = {"height": 8, "width": 8}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        tokenizer=tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token="<image>", chat_template=template,
    )  # fmt: skip


@pytest.fixture
def llava(processor):
    """A tiny LLaVA for that processor."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=3, vision_feature_layer=-1)
    config.eos_token_id, config.pad_token_id = 2, 0
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return model


@pytest.fixture
def image():
    """``image(seed)``: a picture of noise."""
    import numpy as np
    from PIL import Image

    return lambda seed=0: Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8))


@pytest.fixture
def pair():
    """``pair(**changes)``: a pair behind a context."""
    from eff_adapters.sentinel import PreferencePair

    def make(**more):
        return PreferencePair(
            **{
                "question": "there?", "context": "A dog is near the tree.", "y_win": "The dog has a bone.",
                "y_lose": "The dog and a cat are there.", **more,
            }
        )  # fmt: skip

    return make


@pytest.fixture
def table():
    from eff_adapters.sentinel import ObjectTable

    return ObjectTable(
        dict.fromkeys(("dog", "bone", "tree", "table", "chair", "hot dog"), ())
        | {"cat": ("kitty",), "person": ("man", "woman")}
    )
