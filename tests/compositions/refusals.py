"""Pairs that are refused, in the order of applying, and what may not be taken back first: each with its text."""

STORED = ("int8", "FP8", "NVFP4")
QAT = "FP8-aware training"
TRAINED_FLOAT = {(name, QAT): "layers are stored in few bits already" for name in STORED} | {
    (QAT, name): "prepared for training under FP8's noise; convert_qat_ stores them" for name in STORED
}

TEXT_REFUSALS: dict[tuple[str, str], str] = {
    **TRAINED_FLOAT,
    ("LoRA (PEFT)", "LoRA mixer"): "has adapters of PEFT .*; call unload\\(\\) on the PEFT model",
    ("LoRA mixer", "LoRA (PEFT)"): "Target module RoutedLoraLinear",
}
TEXT_HELD: dict[tuple[str, str], str] = {
    ("LlamaFusion", "LoRA mixer"): "was changed again after this change; remove the later change first",
}
DIFFUSION_REFUSALS: dict[tuple[str, str], str] = {**TRAINED_FLOAT}
DIFFUSION_APART: dict[tuple[str, str], str] = {
    ("AttenCraft", name): "its layers come back as they were, in float: put it on last" for name in (*STORED, QAT)
}
DIFFUSION_HELD: dict[tuple[str, str], str] = {}
VISION_REFUSALS: dict[tuple[str, str], str] = {**TRAINED_FLOAT}
VISION_HELD: dict[tuple[str, str], str] = {}
