"""The methods of eff-quant that store weights in few bits, and the one that trains under their noise."""

import functools

import torch
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
from method_table import Row, also, llama, logits, token_ids

NO_HANDLE = {"undo": "'Report' object has no attribute 'remove'"}


def stored(name, config):
    return Row(
        name=name,
        make=llama,
        apply=lambda model: quantize_(model, config),
        run=logits,
        data=token_ids,
        save=lambda model, folder: model.save_pretrained(folder),
        load=load,
        loose=0.3,
        cannot=NO_HANDLE,
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


def load_state(apply, folder):
    model = llama()
    apply(model)
    model.load_state_dict(torch.load(folder / "state.pt"))
    return model


def save_state(model, folder):
    torch.save(model.state_dict(), folder / "state.pt")


# Outlier columns of a whole batch, and one scale for all of its activations, would make each row depend on the others.
INT8 = stored("llm_int8", Int8Config(per_token_outliers=True))
ROWS = [
    INT8,
    stored("fp4", FP4Config()),
    stored("fp8", FP8Config(activations="dynamic")),
    also(INT8, name="sensitivity", apply=lambda model: quantize_(model, recipe().configs())),
    stored("quantvla layers", W4A8Config(rotation="hadamard")),
    also(
        INT8,
        name="quantvla scales",
        apply=lambda model: apply_scale_table(model, scales()),
        save=lambda model, folder: scales().save(folder / "scales.json"),
        load=load_scales,
        cannot={},
    ),
    also(
        INT8,
        name="fp8_qat",
        apply=prepare_qat_,
        save=save_state,
        load=functools.partial(load_state, prepare_qat_),
        cannot={},
    ),
]
