import dataclasses
import functools

from eff_attention.visual_sinks import VARConfig, apply_var
from settings_row import picture_ids, picture_llama, settings_row

CONFIG = VARConfig(
    dims=tuple(range(32)), tau=2.4, rho=0.0, p=1.0, min_image_mass=0.0, first_layer=1, skip_last_layer=False
)

ROWS = [
    settings_row(
        "visual_sinks",
        CONFIG,
        apply_var,
        make=functools.partial(picture_llama, layers=3),
        data=picture_ids,
        zero=dataclasses.replace(CONFIG, p=0.0),
        loose=0.3,  # a token near the threshold may tip over
    )
]
