import torch
from eff_adapters.llamafusion import ModalityTowerConfig, Routing, add_modality_tower
from eff_adapters.llamafusion.routing import ARGUMENT
from method_table import Row, kept_by_state, llama, logits, token_ids

CONFIG = ModalityTowerConfig(
    boi_token_id=97, eoi_token_id=98, patchify="linear", latent_channels=1, latent_size=4, tokens_per_image=4
)


def apply(model):
    tower = add_modality_tower(model, CONFIG)
    with torch.no_grad():  # away from the copies that they start as, and the same for any number of heads
        for parameter in tower.picture_parameters().values():
            parameter.mul_(1.1)
    return tower


def run(model, ids, mask=None):
    """Logits where every token with an odd id goes through the picture weights."""
    return logits(model, ids, mask, **{ARGUMENT: Routing.of(ids % 2)})


ROWS = [
    Row(
        name="llamafusion",
        make=llama,
        apply=apply,
        run=run,
        data=token_ids,
        **kept_by_state(llama, apply),
        cannot={
            "twice": "was changed again after this change; remove the later change first",
            "stranger": "Sequential is not a Llama-type model: it needs a decoder with layers and norm, and an lm_head",
        },
        lora=("q_proj.text", "up_proj"),
    )
]
