from eff_attention.head_reinforcement import VHRConfig, apply_vhr
from settings_row import picture_ids, picture_llama, settings_row

CONFIG = VHRConfig(layers=(0, 1), alpha=2.0)

ROWS = [
    settings_row(
        "head_reinforcement",
        CONFIG,
        apply_vhr,
        make=picture_llama,
        data=picture_ids,
        zero=VHRConfig(layers=(0, 1), alpha=1.0),
        loose=0.7,  # a head near the median may change sides
    )
]
