import torch
from eff_attention.variants import AttentionVariantConfig, load_hybrid, swap_layers_
from method_table import Row, llama, logits, token_ids

KINDS = ("mlp", "approximate", "non_approximate", "rnd_emb_qk", "static_emb_qk")
STRANGER = "wanted a decoder with embed_tokens, layers and rotary_emb, as in Llama, got Sequential"
NO_CACHE = "needs an empty layer of a DynamicCache, got a StaticLayer"


def row(kind):
    def apply(model):
        torch.manual_seed(1)  # an MLP has new weights
        return swap_layers_(model, {1: settings}, match_params=False)

    settings = AttentionVariantConfig(kind=kind, max_len=64, qk_norm=kind == "non_approximate")
    cannot = {"static_cache": NO_CACHE, "stranger": STRANGER}
    if kind == "static_emb_qk":
        cannot["reentrant_checkpointing"] = "use_reentrant': False"
    return Row(
        name=f"variants {kind}",
        kind="rewrite",
        make=llama,
        apply=apply,
        run=logits,
        data=token_ids,
        save=lambda model, folder: model.save_pretrained(folder),
        load=load_hybrid,
        lora=("down_proj",) if kind == "mlp" else ("q_proj", "down_proj"),
        cannot=cannot,
    )


ROWS = [row(kind) for kind in KINDS]
