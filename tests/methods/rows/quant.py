"""The methods of eff-quant that store weights in few bits, and the one that trains under their noise."""

import functools

from eff_quant import (
    FP4Config,
    FP8Config,
    Int8Config,
    ScaleTable,
    W4A8Config,
    apply_scale_table,
    calibrate_scales,
    collect_attention_stats,
    load,
    prepare_qat_,
    quantize_,
    sensitivity_sweep,
)
from method_table import Row, also, kept_by_state, llama, logits, token_ids

ROUNDED = 0.05  # a step over many places where rounding jumps


def stored(name, config):
    return Row(
        name=name,
        kind="rewrite",
        make=llama,
        apply=lambda model: quantize_(model, config),
        run=logits,
        data=token_ids,
        save=lambda model, folder: model.save_pretrained(folder),
        load=load,
        loose=0.3,
        stride=ROUNDED,
    )


@functools.cache
def recipe():
    report = sensitivity_sweep(llama(), token_ids(3, 2, 16), modes=("block",), formats=("nvfp4",), activations=False)
    weights = sum(layer.rows * layer.columns for layer in report.layers)
    return report.recipe("nvfp4", budget_bytes=weights)


@functools.cache
def scales():
    """Factors of attention between a float model and one of few bits."""
    teacher, student, batches = llama(), llama(), [{"input_ids": token_ids(i)} for i in range(2)]
    quantize_(student, FP4Config())
    stats = [collect_attention_stats(model, batches, ["self_attn"]) for model in (teacher, student)]
    return calibrate_scales(*stats)


def load_scales(folder):
    model = llama()
    apply_scale_table(model, ScaleTable.load(folder / "scales.json"))
    return model


# Outlier columns of a whole batch, and one scale for all of its activations, would make each row depend on the others.
INT8 = stored("llm_int8", Int8Config(per_token_outliers=True))
ROWS = [
    INT8,
    stored("fp4", FP4Config()),
    stored("fp8_qat layers", FP8Config(activations="dynamic")),
    also(INT8, name="sensitivity", apply=lambda model: quantize_(model, recipe().configs())),
    stored("quantvla layers", W4A8Config(rotation="hadamard")),
    also(
        INT8,
        name="quantvla scales",
        apply=lambda model: apply_scale_table(model, scales()),
        save=lambda model, folder: scales().save(folder / "scales.json"),
        load=load_scales,
        kind="edit",
        stride=1e-3,
        cannot={
            "twice": "scales have been applied already; remove.* them before applying others",
            "stranger": "the table names 'model.layers.0.self_attn', and the model has no such module",
        },
    ),
    also(
        INT8,
        name="fp8_qat",
        apply=prepare_qat_,
        **kept_by_state(llama, prepare_qat_),
        kind="edit",
        cannot={"twice": "the model is prepared already .*; remove that first"},
    ),
]
