from eff_attention.sink_calibration import ACTConfig, apply_act
from settings_row import settings_row

CONFIG = ACTConfig(layers=(0, 1), threshold=("absolute", 0.15), min_rows=2)

ROWS = [settings_row("sink_calibration", CONFIG, apply_act, loose=0.2)]  # a key near the threshold may tip over
