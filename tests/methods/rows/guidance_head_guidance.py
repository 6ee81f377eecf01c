import torch
from denoisers import make_sd3, sd3_row
from eff_guidance.head_guidance import SoftPAGConfig, apply_head_perturbation
from settings_row import TWO_RULES

CONFIG = SoftPAGConfig(heads=((0, 0), (1, 1)), strength=0.5)


def load(folder):
    model = make_sd3()
    apply_head_perturbation(model, SoftPAGConfig.from_dict(torch.load(folder / "config.pt")))
    return model


ROWS = [
    sd3_row(
        "head_guidance",
        apply=lambda model: apply_head_perturbation(model, CONFIG),
        zero=lambda model: apply_head_perturbation(model, SoftPAGConfig(heads="all", strength=0.0)),
        save=lambda model, folder: torch.save(CONFIG.to_dict(), folder / "config.pt"),
        load=load,
        cannot={"twice": TWO_RULES, "stranger": "heads can be named in .*, not in Sequential"},
    )
]
