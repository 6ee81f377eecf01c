"""What looks on at a language model."""

import torch
from eff_attention.contrastive_focus import record_image_attention
from eff_attention.position_bias import collect_rollout
from method_table import Row, llama, token_ids
from settings_row import picture_ids, picture_llama


def rollout(model, ids, mask=None):
    return collect_rollout(model, ids, mask)[-1]


def look(model, ids, mask=None):
    """Attention to the picture of each row, [B, T, L, N]; a prompt is looked at alone."""
    more = [{} if mask is None else {"attention_mask": row[None]} for row in (ids if mask is None else mask)]
    return torch.stack([
        record_image_attention(model, {"input_ids": row[None], **kind}, max_new_tokens=2).maps
        for row, kind in zip(ids, more, strict=True)
    ])  # fmt: skip


ROWS = [
    Row(
        name="position_bias",
        kind="measure",
        float32=True,
        make=llama,
        run=rollout,
        apply=lambda model: rollout(model, token_ids(0)),
        data=token_ids,
        absent={"left_padding": "rows and columns of padding are taken out, which its package tests"},
    ),
    Row(
        name="contrastive_focus",
        kind="measure",
        float32=True,
        make=picture_llama,
        run=look,
        apply=lambda model: look(model, picture_ids(0)),
        data=picture_ids,
        loose=0.1,
        absent={
            "left_padding": "takes one prompt at a time",
            "gqa": "asked of position_bias, which reads the same rows",
        },
    ),
]
