"""Lite3R joins three packages: a multi-view model, sparse-linear attention in it, and training under FP8 noise."""

import torch
from eff_attention.sparse_linear import SLAConfig, apply_sla, sla_parameters
from eff_kernels import Handle
from eff_quant import prepare_qat_
from eff_vision.multiview import MultiViewConfig, MultiViewTransformer, attention_layers
from method_table import Row, kept_by_state, normal

CONFIG = MultiViewConfig(dim=32, heads=2, depth=2, taps=(0, 1), head_dim=8, camera_depth=1)


def make():
    torch.manual_seed(0)
    return MultiViewTransformer(CONFIG).eval()


def apply(model):
    handle = Handle()
    names = list(attention_layers(model))
    handle.on_remove(apply_sla(model, SLAConfig(k_high=0.5, k_low=0.25, block_q=4, block_k=4), targets=names).remove)
    torch.manual_seed(1)
    for p in sla_parameters(model):
        torch.nn.init.normal_(p, std=0.1)
    handle.on_remove(prepare_qat_(model).remove)
    return handle


ROWS = [
    Row(
        name="lite3r",
        host="other",
        make=make,
        apply=apply,
        run=lambda model, x, mask=None: model(x).depth,
        data=normal(2, 3, 3, 32, 32),
        **kept_by_state(make, apply),
        lora=("first", "projections.0"),
        loose=0.3,
        stride=0.05,
        cannot={
            "bf16": "the heads run in float32, their weights are torch.bfloat16; use torch.autocast for the rest",
            "twice": "has sparse-linear attention already; remove that first",
            "stranger": "Sequential has no attention layers in group 'all'",
        },
    )
]
