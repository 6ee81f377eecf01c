"""Whole tiny pipelines of Stable Diffusion 1, XL and 3 with text encoders and a toy tokenizer of whole words."""

import pytest
import torch

WORDS = ("<pad>", "<s>", "</s>", "<unk>", "a", "photo", "of", "and", "cat", "dog", "red", "ball", ",", "on", "white")


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=12,
    )  # fmt: skip


def clip(*, projected=False, width=32):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, vocab_size=len(WORDS),
        projection_dim=32, bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=12,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


@pytest.fixture
def whole(tiny):
    """``whole("sd15")``: a tiny pipeline with text encoders, for latents of 16 x 16."""

    def make(name):
        if name == "sdxl":
            import warnings

            from diffusers import DDIMScheduler, StableDiffusionXLPipeline

            unet, vae = tiny.model("sdxl"), tiny.pipeline("sd15").vae
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return StableDiffusionXLPipeline(
                    unet=unet, vae=vae, scheduler=DDIMScheduler(), text_encoder=clip(projected=True, width=16),
                    text_encoder_2=clip(projected=True, width=16), tokenizer=make_tokenizer(),
                    tokenizer_2=make_tokenizer(), add_watermarker=False,
                )  # fmt: skip
        pipe = tiny.pipeline(name)
        if name == "sd15":
            pipe.register_modules(text_encoder=clip(), tokenizer=make_tokenizer())
            return pipe
        # CLIP's states are brought to the 32 that the transformer reads by halves of 16
        pipe.register_modules(
            text_encoder=clip(projected=True, width=16), tokenizer=make_tokenizer(),
            text_encoder_2=clip(projected=True, width=16), tokenizer_2=make_tokenizer(),
        )  # fmt: skip
        pipe.tokenizer_max_length = 12
        return pipe

    return make
