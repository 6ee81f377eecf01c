import torch
from eff_attention.visual_sinks import VARConfig, apply_var
from method_table import Row, llama, logits, token_ids

PICTURE = 96
CONFIG = VARConfig(
    dims=tuple(range(32)), tau=2.4, rho=0.0, p=1.0, min_image_mass=0.0, first_layer=1, skip_last_layer=False
)


def make():
    """A Llama some of whose tokens stand for pictures."""
    model = llama(layers=3)
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
    apply_var(model, VARConfig.from_dict(torch.load(folder / "config.pt")))
    return model


ROWS = [
    Row(
        name="visual_sinks",
        make=make,
        apply=lambda model: apply_var(model, CONFIG),
        run=logits,
        data=data,
        save=save,
        load=load,
        loose=0.3,  # a token near the threshold may tip over
    )
]
