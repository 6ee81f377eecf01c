import torch
from eff_attention.head_reinforcement import VHRConfig, apply_vhr
from method_table import Row, llama, logits, token_ids

PICTURE = 96
CONFIG = VHRConfig(layers=(0, 1), alpha=2.0)


def make():
    """A Llama some of whose tokens stand for pictures."""
    model = llama()
    model.config.image_token_id = PICTURE
    return model


def data(seed):
    ids = token_ids(seed) % (PICTURE - 1) + 1
    ids[:, 7:16] = PICTURE
    return ids


def save(model, folder):
    model.save_pretrained(folder / "model")
    torch.save(CONFIG.to_dict(), folder / "config.pt")


def load(folder):
    model = type(llama()).from_pretrained(folder / "model")
    apply_vhr(model, VHRConfig.from_dict(torch.load(folder / "config.pt")))
    return model


ROWS = [
    Row(
        name="head_reinforcement",
        make=make,
        apply=lambda model: apply_vhr(model, CONFIG),
        run=logits,
        data=data,
        save=save,
        load=load,
        loose=0.7,  # a head near the median may change sides
    )
]
