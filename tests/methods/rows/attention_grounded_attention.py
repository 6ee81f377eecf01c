from eff_attention.grounded_attention import PAIConfig, apply_paint
from settings_row import picture_ids, picture_llama, settings_row

CONFIG = PAIConfig(alpha=0.7, first_layer=0, head_gain="attention_mass", rows="all_text")

ROWS = [
    settings_row(
        "grounded_attention",
        CONFIG,
        apply_paint,
        make=picture_llama,
        data=picture_ids,
        zero=PAIConfig(alpha=0.0, first_layer=0),
    )
]
