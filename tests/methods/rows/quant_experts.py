"""Experts of a mixture in few bits, which only their own tokens go through."""

from eff_quant import FP4Config, Int8Config, quantize_
from eff_quant.load import load
from method_table import Row, logits, neighbour, token_ids

MODELS = neighbour("packages/eff-quant/tests/experts/conftest.py")


def make():
    return MODELS.make("mixtral")


def data(seed):
    return token_ids(seed) % 95 + 1


def row(name, config):
    return Row(
        name=f"experts {name}",
        kind="rewrite",
        make=make,
        apply=lambda model: quantize_(model, config),
        run=logits,
        data=data,
        save=lambda model, folder: model.save_pretrained(folder),
        load=load,
        lora=("q_proj", "k_proj"),
        loose=0.5,  # a token may go to another expert
        stride=0.05,
        absent={"gqa": "asked of the dense models"},
    )


ROWS = [row("int8", Int8Config(per_token_outliers=True)), row("nvfp4", FP4Config())]
