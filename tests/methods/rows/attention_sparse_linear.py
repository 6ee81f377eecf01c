import torch
from eff_attention.sparse_linear import SLAConfig, apply_sla, load_sla, save_sla, sla_parameters
from method_table import Row, normal
from transformers import ViTConfig, ViTModel

CONFIG = SLAConfig(k_high=0.25, k_low=0.25, block_q=4, block_k=4)


def make():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTModel(ViTConfig(**sizes, image_size=24, patch_size=4), add_pooling_layer=False).eval()


def apply(model):
    handle = apply_sla(model, CONFIG)
    torch.manual_seed(1)
    for p in sla_parameters(model):
        torch.nn.init.normal_(p, std=0.1)
    return handle


def load(folder):
    model = make()
    load_sla(model, folder / "sla")
    return model


def run(model, pictures, mask=None):
    more = {} if mask is None else {"attention_mask": mask}
    return model(pixel_values=pictures, **more).last_hidden_state


ROWS = [
    Row(
        name="sparse_linear",
        host="other",
        make=make,
        apply=apply,
        run=run,
        data=normal(2, 3, 24, 24),
        save=lambda model, folder: save_sla(model, folder / "sla"),
        load=load,
        lora=("q_proj", "query", "fc1"),
        cannot={
            "twice": "has sparse-linear attention already; remove that first",
            "stranger": "no attention was found",
        },
    )
]
