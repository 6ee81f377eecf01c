"""Preferences of sentences: a loss on a language model with LoRA, whose reference is the model without it."""

import torch
from eff_adapters.sentinel import CDPOConfig, add_lora, c_dpo_step, pair_logps
from method_table import Row, llama, token_ids

CONFIG = CDPOConfig(lora_r=4, lora_alpha=8)


class Policy(torch.nn.Module):
    """A model, and the PEFT model around it once the method has been put in."""

    def __init__(self):
        super().__init__()
        self.inner = llama()


def apply(model):
    torch.manual_seed(1)
    model.inner = add_lora(model.inner, CONFIG, init_lora_weights=False)


def batch(ids, mask=None):
    labels = ids.clone()
    labels[:, :10] = -100
    mask = torch.ones_like(ids) if mask is None else mask
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run(model, ids, mask=None):
    """Log-probabilities of the two sentences of a pair, [2]."""
    return torch.cat(pair_logps(model.inner, batch(ids, mask)))


def train(model, ids, mask=None):
    return c_dpo_step(model.inner, batch(ids), CONFIG)[0]


def load(folder):
    from peft import PeftModel

    model = Policy()
    model.inner = PeftModel.from_pretrained(model.inner, folder)
    return model


WHOLE = "its loss is of pairs, on a model of transformers and PEFT, whose own properties those are"
ROWS = [
    Row(
        name="sentinel",
        kind="rewrite",
        host="other",
        make=Policy,
        apply=apply,
        run=run,
        train=train,
        float32=True,
        data=token_ids,
        save=lambda model, folder: model.inner.save_pretrained(folder),
        load=load,
        absent=dict.fromkeys(("bf16", "alone", "under_peft", "stranger", "threads"), WHOLE),
    )
]
