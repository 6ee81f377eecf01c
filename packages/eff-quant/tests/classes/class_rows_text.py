"""Language models and encoders of text."""

import torch
import transformers as hf
from class_table import ModelClass

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}


def ids(seed):
    """Ids [2, 9] without those that have a meaning."""
    return torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(seed))


def words(seed):
    return {"input_ids": ids(seed), "attention_mask": torch.ones(2, 9, dtype=torch.long)}


def decoder(name, config, sizes=GROUPED, without_adapter=(), note="", **more):
    """A row for a model that writes."""
    return ModelClass(
        name=name,
        kind="Language models",
        make=lambda: getattr(hf, name)(getattr(hf, config)(**sizes, **more)),
        inputs=words,
        output=lambda out: out.logits,
        prompt=lambda: words(5),
        without_adapter=without_adapter,
        note=note,
    )


def encoder(name, config, sizes=SIZES, output=lambda out: out.logits, **more):
    """A row for a model that reads."""
    return ModelClass(
        name=name,
        kind="Encoders and classifiers of text",
        make=lambda: getattr(hf, name)(getattr(hf, config)(**sizes, **more)),
        inputs=words,
        output=output,
    )


def both(name, config, **sizes):
    """A row for a model of an encoder and a decoder."""
    return ModelClass(
        name=name,
        kind="Language models",
        make=lambda: getattr(hf, name)(getattr(hf, config)(**sizes, pad_token_id=0, eos_token_id=2)),
        inputs=lambda seed: {"input_ids": ids(seed), "decoder_input_ids": ids(seed + 1)[:, :4]},
        output=lambda out: out.logits,
        prompt=lambda: words(5),
    )


GPT2 = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 96,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BART = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": 96, "max_position_embeddings": 64, "bos_token_id": 1,
    "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
MAMBA = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "state_size": 16}
T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 96,
    "decoder_start_token_id": 0,
}

ROWS = [
    decoder("LlamaForCausalLM", "LlamaConfig"),
    decoder("MistralForCausalLM", "MistralConfig", head_dim=16, sliding_window=8),
    decoder("Qwen2ForCausalLM", "Qwen2Config"),
    decoder("Qwen3ForCausalLM", "Qwen3Config", head_dim=16),
    decoder("Gemma2ForCausalLM", "Gemma2Config", head_dim=16, query_pre_attn_scalar=16, sliding_window=8),
    decoder("Gemma3ForCausalLM", "Gemma3TextConfig", head_dim=16, query_pre_attn_scalar=16, sliding_window=8),
    decoder("Phi3ForCausalLM", "Phi3Config"),
    decoder("StableLmForCausalLM", "StableLmConfig"),
    decoder("CohereForCausalLM", "CohereConfig"),
    decoder("SmolLM3ForCausalLM", "SmolLM3Config"),
    decoder("Olmo2ForCausalLM", "Olmo2Config"),
    decoder("GraniteForCausalLM", "GraniteConfig"),
    decoder("OPTForCausalLM", "OPTConfig", SIZES, ffn_dim=96, word_embed_proj_dim=32),
    decoder("GPT2LMHeadModel", "GPT2Config", GPT2),
    decoder("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES),
    decoder("FalconForCausalLM", "FalconConfig", SIZES, ffn_hidden_size=96),
    decoder("BloomForCausalLM", "BloomConfig", SIZES, n_layer=2, n_head=4),
    decoder(
        "MambaForCausalLM",
        "MambaConfig",
        MAMBA,
        without_adapter=("out_proj",),
        note="PEFT refuses adapters on `out_proj`, whose weight the model's fused kernels read",
    ),
    decoder("MixtralForCausalLM", "MixtralConfig", num_local_experts=4),
    decoder(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    both("T5ForConditionalGeneration", "T5Config", **T5),
    both("BartForConditionalGeneration", "BartConfig", **BART),
    encoder("BertForMaskedLM", "BertConfig"),
    encoder("RobertaForSequenceClassification", "RobertaConfig", num_labels=3),
    encoder(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {
            "dim": 64,
            "hidden_dim": 96,
            "n_layers": 2,
            "n_heads": 4,
            "vocab_size": 96,
            "max_position_embeddings": 64,
            "num_labels": 3,
        },
    ),
    encoder("ModernBertForMaskedLM", "ModernBertConfig", cls_token_id=1, sep_token_id=2),
    encoder("DebertaV2ForTokenClassification", "DebertaV2Config", num_labels=3),
    encoder("ElectraForQuestionAnswering", "ElectraConfig", output=lambda out: out.start_logits, embedding_size=32),
    encoder(
        "MobileBertForMaskedLM", "MobileBertConfig", embedding_size=32, intra_bottleneck_size=32, true_hidden_size=32
    ),
]
