import dataclasses

from eff_attention.sink_calibration import ACTConfig, apply_act
from settings_row import TWO_RULES, settings_row

CONFIG = ACTConfig(layers=(0, 1), threshold=("absolute", 0.15), min_rows=2)

CANNOT = {
    "twice": TWO_RULES,
    "stranger": "calibration needs a decoder on transformers' AttentionInterface, got Sequential",
}
# A key near the threshold may tip over.
ROWS = [
    settings_row(
        "sink_calibration",
        CONFIG,
        apply_act,
        zero=dataclasses.replace(CONFIG, beta=1.0),
        loose=0.2,
        stride=1e-4,
        cannot=CANNOT,
    )
]
