import pytest
import torch
from eff_guidance.pokefusion import StyleAttentionConfig, add_style_attention


@pytest.fixture
def styled():
    """``styled(pipe_or_model, gate=0.5, **config)``: a handle whose style is seen."""

    def make(model, gate=0.5, **config):
        torch.manual_seed(1)
        handle = add_style_attention(model, StyleAttentionConfig(**{"style_dim": 16, "tokens_per_style": 4, **config}))
        with torch.no_grad():
            handle.adapter.style.table.mul_(50)
            for name in handle.adapter.names:
                handle.adapter.layer(name).gate.fill_(gate)
        return handle

    return make


@pytest.fixture
def eager():
    """Puts diffusers' eager or sliced processors into a UNet."""

    def put(model, kind):
        from diffusers.models import attention_processor as processors

        if kind == "eager":
            model.set_attn_processor(processors.AttnProcessor())
        if kind == "sliced":
            model.set_attention_slice(1)
        return model

    return put
