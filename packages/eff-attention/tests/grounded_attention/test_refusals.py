"""PAINT in nine families of picture-language models, against selection and softmax written out."""

import pytest
import torch
from eff_attention.grounded_attention import (
    PAINTConfig,
    apply_paint,
    informed_tokens_in,
)
from transformers import DynamicCache


def test_bad_layers_and_models(zoo):
    model = zoo("Llava")
    for config in (PAINTConfig(local_layer=3), PAINTConfig(summary_layer=-4)):
        with pytest.raises(ValueError, match=r"has 0\.\.2"):
            apply_paint(model, config)
    with pytest.raises(ValueError, match=r"layers 0\.\.3"):
        apply_paint(model, PAINTConfig(first_layer=4))
    with pytest.raises(NotImplementedError, match="Linear"):
        apply_paint(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing is known"):
        informed_tokens_in(DynamicCache(config=model.config))
