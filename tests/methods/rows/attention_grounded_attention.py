import torch
from eff_attention.grounded_attention import PAIConfig, apply_paint
from method_table import Row, llama, logits, token_ids

PICTURE = 96
CONFIG = PAIConfig(alpha=0.7, first_layer=0, head_gain="attention_mass", rows="all_text")


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
    apply_paint(model, PAIConfig.from_dict(torch.load(folder / "config.pt")))
    return model


ROWS = [
    Row(
        name="grounded_attention",
        make=make,
        apply=lambda model: apply_paint(model, CONFIG),
        run=logits,
        data=data,
        save=save,
        load=load,
    )
]
