import torch
from eff_attention.sink_calibration import ACTConfig, apply_act
from method_table import Row, llama, logits, token_ids

CONFIG = ACTConfig(layers=(0, 1), threshold=("absolute", 0.15), min_rows=2)


def save(model, folder):
    model.save_pretrained(folder / "model")
    torch.save(CONFIG.to_dict(), folder / "config.pt")


def load(folder):
    model = type(llama()).from_pretrained(folder / "model")
    apply_act(model, ACTConfig.from_dict(torch.load(folder / "config.pt")))
    return model


ROWS = [
    Row(
        name="sink_calibration",
        make=llama,
        apply=lambda model: apply_act(model, CONFIG),
        run=logits,
        data=token_ids,
        save=save,
        load=load,
        loose=0.2,  # a key near the threshold may tip over
    )
]
