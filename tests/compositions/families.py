"""The families of tiny models and the parts that fit them."""

import functools
import zlib
from typing import Any

import torch
from composing import Family, Part
from eff_adapters.llamafusion import ModalityTowerConfig, Routing, add_modality_tower
from eff_adapters.llamafusion.routing import ARGUMENT, ModalityModule
from eff_adapters.lora_mixer import FreshExpert, LoraMixerConfig, apply_lora_mixer
from eff_attention.grounded_attention import PAIConfig, apply_paint
from eff_attention.head_reinforcement import VHRConfig, apply_vhr
from eff_attention.layer_reuse import LayerReuseConfig, LayerReusePolicy, apply_layer_reuse
from eff_attention.sink_calibration import ACTConfig, apply_act
from eff_attention.sparse_linear import SLAConfig, apply_sla, sla_parameters
from eff_attention.visual_sinks import VARConfig, apply_var
from eff_guidance.attencraft import train_projections
from eff_guidance.context_brush import CanvasSpans, ContextBrushConfig, apply_incontext_brush
from eff_guidance.head_guidance import SoftPAGConfig, apply_head_perturbation
from eff_guidance.pokefusion import StyleAttentionConfig, add_style_attention
from eff_guidance.refam import capture_joint_attention
from eff_kernels import Handle
from eff_quant import FP4Config, FP8Config, Int8Config, prepare_qat_, quantize_
from eff_vision.unip import AttentionTap
from refusals import (
    DIFFUSION_APART,
    DIFFUSION_HELD,
    DIFFUSION_REFUSALS,
    TEXT_HELD,
    TEXT_REFUSALS,
    VISION_HELD,
    VISION_REFUSALS,
)
from torch import Tensor, nn


def lora(model: nn.Module, targets: tuple[str, ...], scale: float = 1.0) -> Handle:
    """LoRA by PEFT, put into the model in place; with scale 0 its second matrices are zero."""
    import peft

    if any(isinstance(m, ModalityModule) for m in model.modules()):  # a layer is then two, of text and of pictures
        targets = ("q_proj.text", "q_proj.picture", "down_proj")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False))
    for name, p in adapted.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:  # by name: the same adapter whatever else lies on the model
            seed = zlib.crc32(name.replace(".text", "").replace(".picture", "").encode())
            p.data = 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            p.data.mul_(scale if "lora_B" in name else 1)
    handle = Handle()
    handle.on_remove(adapted.unload)
    return handle


def lora_part(*targets: str) -> Part:
    """LoRA on these layers."""
    return Part(
        name="LoRA (PEFT)", package="peft", apply=functools.partial(lora, targets=targets),
        zero=functools.partial(lora, targets=targets, scale=0.0),
    )  # fmt: skip


def stored(name: str, config: Any) -> Part:
    """Weights in few bits; activations stay as they are, so that the same weights in float are the truth."""
    return Part(name=name, package="eff-quant", kind="rewrite", apply=lambda model: quantize_(model, config))


STORED = [
    stored("int8", Int8Config(activation="none")), stored("FP8", FP8Config()),
    stored("NVFP4", FP4Config(fuse_groups=())),
]  # fmt: skip
# Without groups: q, k and v share one scale by their names, which others change (LlamaFusion's are "q_proj.text").
QAT = Part(name="FP8-aware training", package="eff-quant", apply=prepare_qat_)


def named(*parts: Part) -> dict[str, Part]:
    """Parts by name."""
    return {part.name: part for part in parts}


# --- language -------------------------------------------------------------------------------------------------------

POLICY = LayerReusePolicy(("full", "anchor", "reuse"), (-1, -1, 1))
DENSE = LayerReusePolicy(("full",) * 3, (-1,) * 3)
REUSE = LayerReuseConfig(top_k=12, block_size=4, min_seq_len=12, must_select=(0, -1))
LAYERS = (0, 1, 2)
TOWER = ModalityTowerConfig(
    boi_token_id=97, eoi_token_id=98, patchify="linear", latent_channels=1, latent_size=4, tokens_per_image=4
)


def text_model() -> Any:
    """A Llama of three layers some of whose tokens are pictures."""
    from settings_row import picture_llama

    return picture_llama(layers=3)


def text_ids() -> Tensor:
    """Ids [2, 24] with a picture in each row."""
    from settings_row import picture_ids

    return picture_ids(0)


def text_run(model: Any, ids: Tensor, arguments: Any) -> Tensor:
    """Logits of a prompt and of a step after it, with a cache."""
    from transformers import DynamicCache

    cache, found = DynamicCache(config=model.config), []
    for first, last in [(0, 23), (23, 24)]:
        more: dict[str, Any] = {}
        for part in arguments["parts"]:
            if part.arguments is not None:
                more |= part.arguments(ids[:, first:last])
        found.append(model(input_ids=ids[:, first:last], use_cache=True, past_key_values=cache, **more).logits)
    return torch.cat(found, 1)


def tower(model: Any) -> Any:
    """A second set of weights for tokens of one kind, away from the copies that they start as."""
    added = add_modality_tower(model, TOWER)
    with torch.no_grad():
        for parameter in added.picture_parameters().values():
            if parameter.ndim == 1:  # of norms: the others may be stored in few bits
                parameter.mul_(1.1)
    return added


def mixer(model: Any, scale: float = 0.1) -> Any:
    """Three routed LoRA experts on queries and outputs."""
    torch.manual_seed(3)
    config = LoraMixerConfig(target_modules=("q_proj", "o_proj"), top_k=2, router_init_std=0.3)
    mixed = apply_lora_mixer(model, config, experts={name: FreshExpert(rank=2) for name in "abc"})
    with torch.no_grad():
        for layer in mixed.layers.values():
            layer.lora_B.normal_(0, 1).mul_(scale)
    return mixed


def steering(name: str, apply: Any, config: Any, zero: Any, order: int) -> Part:
    """A rule on the attention of the decoder."""
    return Part(
        name=name, package="eff-attention", apply=lambda model: apply(model, config, order=order),
        zero=lambda model: apply(model, zero, order=order),
        rule=True,
    )  # fmt: skip


ACT = {"layers": LAYERS, "threshold": ("absolute", 0.05), "min_rows": 2}
VAR = {
    "dims": tuple(range(32)), "tau": 2.0, "rho": 0.0, "min_image_mass": 0.0, "first_layer": 0, "skip_last_layer": False,
}  # fmt: skip
TEXT = Family(
    name="language model",
    make=text_model,
    run=text_run,
    data=text_ids,
    parts=named(
        *STORED,
        QAT,
        Part(
            name="layer reuse", package="eff-attention",
            apply=lambda model: apply_layer_reuse(model, POLICY, REUSE, order=0),
            zero=lambda model: apply_layer_reuse(model, DENSE, REUSE, order=0),
            rule=True,
        ),
        steering("sink calibration", apply_act, ACTConfig(**ACT), ACTConfig(**ACT, beta=1.0), 1),
        steering("visual sinks", apply_var, VARConfig(**VAR, p=1.0), VARConfig(**VAR, p=0.0), 2),
        steering("head reinforcement", apply_vhr, VHRConfig(layers=LAYERS), VHRConfig(layers=LAYERS, alpha=1.0), 3),
        steering(
            "grounded attention", apply_paint, PAIConfig(alpha=0.7, first_layer=0, rows="all_text"),
            PAIConfig(alpha=0.0, first_layer=0), 4,
        ),
        lora_part("q_proj", "down_proj"),
        Part(
            name="LoRA mixer", package="eff-adapters", apply=mixer, zero=functools.partial(mixer, scale=0.0)
        ),
        Part(
            name="LlamaFusion", package="eff-adapters", apply=tower,
            arguments=lambda ids: {ARGUMENT: Routing.of(ids % 2)},
        ),
    ),
    refusals=TEXT_REFUSALS,
    held=TEXT_HELD,
)  # fmt: skip

# --- diffusion ------------------------------------------------------------------------------------------------------

SPANS = CanvasSpans(grid=(8, 8), subjects=((0, 0, 4, 8),), query=(4, 0, 8, 8))
SLA = SLAConfig(k_high=0.25, k_low=0.25, block_q=4, block_k=4)


def diffusion_run(model: Any, latents: Tensor, arguments: Any) -> Tensor:
    """One pass."""
    from denoisers import denoise

    return denoise(model, latents)


def diffusion_model() -> Any:
    """A transformer of SD3's class."""
    from denoisers import make_sd3

    return make_sd3()


def sparse(model: Any, order: int | None = 9) -> Any:
    """Sparse-linear attention with trained projections."""
    handle = apply_sla(model, SLA, order=order)
    torch.manual_seed(1)
    for p in sla_parameters(model):
        nn.init.normal_(p, std=0.1)
    return handle


def style(model: Any, gate: float = 0.5) -> Any:
    """A style whose tokens are seen in every block."""
    torch.manual_seed(1)
    handle = add_style_attention(model, StyleAttentionConfig(style_dim=16, tokens_per_style=4, layers="all"), order=3)
    with torch.no_grad():
        handle.adapter.style.table.mul_(50)
        for name in handle.adapter.names:
            layer = handle.adapter.layer(name)
            layer.gate.fill_(gate)
            for p in (layer.to_k_style.weight, layer.to_v_style.weight):  # they start as the model's own of that time
                p.normal_(0, 0.2)
    return handle


def concept(model: Any, change: float = 0.1) -> Any:
    """Projections of a learnt concept."""
    handle, layers = train_projections(model)
    with torch.no_grad():
        for i, layer in enumerate(layers.values()):
            layer.weight.add_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(i)), alpha=change)
    return handle


def brush(model: Any, **settings: float) -> Any:
    """The brush on a canvas of two halves."""
    return apply_incontext_brush(model, SPANS, ContextBrushConfig(**settings), order=2)


def damage(model: Any, strength: float = 0.5) -> Any:
    """Two damaged heads."""
    return apply_head_perturbation(model, SoftPAGConfig(heads=((0, 0), (1, 1)), strength=strength), order=1)


DIFFUSION = Family(
    name="diffusion transformer",
    make=diffusion_model,
    run=diffusion_run,
    data=lambda: torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
    parts=named(
        *STORED,
        QAT,
        Part(name="sparse-linear attention", package="eff-attention", apply=sparse),
        Part(
            name="head guidance",
            rule=True, package="eff-guidance", apply=damage, zero=functools.partial(damage, strength=0.0)
        ),
        Part(
            name="context brush",
            rule=True, package="eff-guidance", apply=functools.partial(brush, shift_image=0.5),
            zero=functools.partial(brush, shift_image=0.0, shift_text=0.0, head_gain=0.0),
        ),
        Part(
            name="PokeFusion",
            rule=True, package="eff-guidance", apply=style, zero=functools.partial(style, gate=0.0),
            context=lambda handle: handle.use(0, unconditional=0),
        ),
        Part(
            name="AttenCraft", package="eff-guidance", own=True, apply=concept,
            zero=functools.partial(concept, change=0.0),
        ),
        Part(
            name="RefAM", package="eff-guidance", kind="measure", apply=lambda model: None,
            context=capture_joint_attention,
        ),
        lora_part("to_q", "to_out.0"),
    ),
    refusals=DIFFUSION_REFUSALS,
    held=DIFFUSION_HELD,
    apart=DIFFUSION_APART,
)  # fmt: skip

# --- vision ---------------------------------------------------------------------------------------------------------


def vision_model() -> Any:
    """A ViT of two layers."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTModel(ViTConfig(**sizes, image_size=24, patch_size=4), add_pooling_layer=False).eval()


VISION = Family(
    name="vision transformer",
    make=vision_model,
    run=lambda model, pictures, arguments: model(pixel_values=pictures).last_hidden_state,
    data=lambda: torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)),
    parts=named(
        *STORED,
        QAT,
        Part(name="sparse-linear attention", package="eff-attention", apply=sparse),
        Part(name="UNIP's tap", package="eff-vision", kind="measure", apply=lambda model: None, context=AttentionTap),
        lora_part("q_proj", "query", "fc1", "dense"),
    ),
    refusals=VISION_REFUSALS,
    held=VISION_HELD,
)

FAMILIES = {family.name: family for family in (TEXT, DIFFUSION, VISION)}
STACKS = [
    (TEXT, ("int8", "layer reuse", "LoRA (PEFT)", "sink calibration")),
    (TEXT, ("NVFP4", "LoRA (PEFT)", "visual sinks", "head reinforcement")),
    (TEXT, ("LoRA mixer", "sink calibration", "layer reuse")),
    (DIFFUSION, ("int8", "head guidance", "LoRA (PEFT)")),
    (DIFFUSION, ("NVFP4", "LoRA (PEFT)", "PokeFusion", "context brush")),
    (VISION, ("FP8", "sparse-linear attention", "LoRA (PEFT)")),
    (VISION, ("sparse-linear attention", "FP8-aware training", "UNIP's tap")),
]
"""Triples and more, in the order of applying."""
