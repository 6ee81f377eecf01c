"""Stacks and pairs on the real models of eff-embedded."""

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from composing import PROMISES, UNDONE, Family, Part, stored_is_float, undone_from_the_first, undone_from_the_last
from eff_attention.grounded_attention import PAIConfig, apply_paint
from eff_attention.layer_reuse import LayerReuseConfig, LayerReusePolicy, apply_layer_reuse
from eff_attention.sink_calibration import ACTConfig, apply_act
from eff_attention.sparse_linear import SLAConfig, apply_sla
from eff_guidance.head_guidance import SoftPAGConfig, apply_head_guidance
from eff_guidance.layerbind import Layer, LayerBindConfig, Layout, apply_layerbind
from eff_kernels.edit.caches import cache_kwargs
from eff_quant import FP8Config, Int8Config
from families import QAT, lora, named, stored
from refusals import TRAINED_FLOAT
from torch import Tensor, nn

POLICY = Path(__file__).parents[2] / "packages/eff-attention/bench/results/layer_reuse_smollm2.json"
INT8 = stored("int8", Int8Config(activation="none"))
QUESTION = "Name the largest planet, then the smallest, and say in one sentence what sets them apart. "


@functools.cache
def loaded(name: str) -> Any:
    """A loader's answer, once."""
    import eff_embedded

    return getattr(eff_embedded, name)()


def reuse(model: Any, dense: bool = False) -> Any:
    """Layer reuse by the searched policy, or with all layers full."""
    policy = LayerReusePolicy.load(POLICY)
    if dense:
        policy = LayerReusePolicy(("full",) * 30, (-1,) * 30)
    config = LayerReuseConfig(top_k=24, block_size=4, min_seq_len=40, must_select=(0, -1))
    return apply_layer_reuse(model, policy, config, order=0)


def adapter(*targets: str, inner: Any = lambda model: model) -> Part:
    """LoRA of the usual form on a model, or on a part of it."""

    def put(model: Any, scale: float) -> Any:
        return lora(inner(model), targets, scale)

    return Part(
        name="LoRA (PEFT)", package="peft", apply=functools.partial(put, scale=0.1),
        zero=functools.partial(put, scale=0.0),
    )  # fmt: skip


def text_ids() -> Tensor:
    """A prompt of SmolLM2, of which the last two tokens are decoded."""
    _, tokenizer = loaded("load_smollm2")
    ids = tokenizer(QUESTION * 4, return_tensors="pt").input_ids
    return ids[:, :60]


def cut_run(model: Any, ids: Tensor, arguments: Any) -> Tensor:
    """Logits of a prompt and of two steps after it, with a cache."""
    from transformers import DynamicCache

    cache, found = DynamicCache(config=model.config), []
    for first, last in [(0, 58), (58, 59), (59, 60)]:
        found.append(model(input_ids=ids[:, first:last], use_cache=True, **cache_kwargs(model, cache)).logits)
    return torch.cat(found, 1)


ACT = {"layers": tuple(range(2, 29)), "threshold": ("relative", 3.0)}
SMOLLM2 = Family(
    name="SmolLM2",
    make=lambda: copy.deepcopy(loaded("load_smollm2")[0]),
    run=cut_run,
    data=text_ids,
    parts=named(
        INT8,
        Part(
            name="layer reuse", package="eff-attention", apply=reuse, zero=functools.partial(reuse, dense=True),
            rule=True,
        ),
        adapter("q_proj", "v_proj"),
        Part(
            name="sink calibration", package="eff-attention",
            apply=lambda model: apply_act(model, ACTConfig(**ACT), order=1),
            zero=lambda model: apply_act(model, ACTConfig(**ACT, beta=1.0), order=1),
            rule=True,
        ),
        QAT,
    ),
    refusals=TRAINED_FLOAT,
)  # fmt: skip


@functools.cache
def eyes_inputs() -> Any:
    """A question about a collage."""
    from eff_embedded import collages
    from PIL import Image

    _, processor = loaded("load_smollm2_eyes")
    picture = Image.fromarray(collages.sample(1).picture)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    return processor(images=[picture], text=text, return_tensors="pt")


def eyes_run(model: Any, inputs: Any, arguments: Any) -> Tensor:
    """Scores of two tokens that follow, [2, V]."""
    out = model.generate(
        **inputs, max_new_tokens=2, do_sample=False, eos_token_id=None, output_scores=True, return_dict_in_generate=True
    )
    return torch.cat(out.scores)


def raised(model: Any, alpha: float = 0.5) -> Any:
    """Attention to the picture is raised."""
    return apply_paint(model, PAIConfig(alpha=alpha, first_layer=2), order=1)


EYES = Family(
    name="SmolLM2 with eyes",
    make=lambda: copy.deepcopy(loaded("load_smollm2_eyes")[0]),
    run=eyes_run,
    data=eyes_inputs,
    parts=named(
        INT8,
        adapter("up_proj"),
        Part(
            name="grounded attention", package="eff-attention", apply=raised, zero=functools.partial(raised, alpha=0.0)
        ),
    ),
)  # fmt: skip


@functools.cache
def studio() -> Any:
    """eff-studio's own model."""
    from eff_studio.engine.model import load_model

    return load_model()


class Drawing(nn.Module):
    """The pipeline of collage diffusion as a module."""

    def __init__(self) -> None:
        super().__init__()
        whole = studio().pipe
        parts = {**whole.components, "transformer": copy.deepcopy(whole.transformer)}
        self.pipe = type(whole)(**parts, **{k: whole.config[k] for k in ("prompt_mean", "prompt_std")})
        self.pipe.set_progress_bar_config(disable=True)
        self.transformer = self.pipe.transformer


LAYOUT = Layout(
    background="a blue background",
    layers=(
        Layer(prompt="a dog on a blue background", box=(0.1, 0.4, 0.6, 0.9)),
        Layer(prompt="a house on a blue background", box=(0.4, 0.1, 0.9, 0.6)),
    ),
)


def layout(model: Any, works: bool = True) -> Any:
    """Two layers, each in its box."""
    config = LayerBindConfig(hard_blocks=(0,)) if works else LayerBindConfig(eta1=0, eta2=0)
    return apply_layerbind(model.pipe, LAYOUT, config, order=2)


def guidance(model: Any, scale: float = 3.0) -> Any:
    """Guidance by two damaged heads."""
    config = SoftPAGConfig(heads=((3, 0), (4, 1)), strength=0.5, scale=scale)
    return apply_head_guidance(model.pipe, config, order=1)


def draw(model: Any, prompt: str, arguments: Any) -> Tensor:
    """Latents after three steps."""
    return model.pipe(prompt, seed=0, num_inference_steps=3, output_type="latent").images


COLLAGES = Family(
    name="collage diffusion",
    make=Drawing,
    run=draw,
    data=lambda: "a dog in front of a house on a blue background",
    parts=named(
        Part(name="int8", package="eff-quant", kind="rewrite", apply=lambda model: INT8.apply(model.transformer)),
        Part(
            name="layouts", package="eff-guidance", apply=layout, zero=functools.partial(layout, works=False),
            rule=True,
        ),
        Part(
            name="head guidance", package="eff-guidance", apply=guidance,
            zero=functools.partial(guidance, scale=0.0), rule=True,
        ),
        adapter("to_q", "to_v", inner=lambda model: model.transformer),
    ),
    bound=0.02,  # steps carry rounding on
    copies=False,
)  # fmt: skip

VIT = Family(
    name="ViT-S/14",
    make=lambda: copy.deepcopy(loaded("load_vit")),
    run=lambda model, pictures, arguments: model(pixel_values=pictures).last_hidden_state,
    data=lambda: torch.randn(1, 3, 126, 126, generator=torch.Generator().manual_seed(0)),
    parts=named(
        stored("FP8", FP8Config()),
        Part(
            name="sparse-linear attention", package="eff-attention",
            apply=lambda model: apply_sla(model, SLAConfig(k_high=0.25, k_low=0.25, block_q=8, block_k=8)),
        ),
        adapter("q_proj", "v_proj"),
    ),
)  # fmt: skip

STACKS = [
    (SMOLLM2, ("int8", "layer reuse", "LoRA (PEFT)", "sink calibration"), (undone_from_the_first,)),
    (EYES, ("int8", "LoRA (PEFT)", "grounded attention"), (undone_from_the_last,)),
    (COLLAGES, ("int8", "LoRA (PEFT)", "layouts", "head guidance"), UNDONE),
    (VIT, ("FP8", "sparse-linear attention", "LoRA (PEFT)"), PROMISES),
]
"""In the order of applying, with what is looked at: on large models the half that takes least time."""

PAIRS = [(VIT, pair, (stored_is_float, *UNDONE)) for pair in VIT.pairs()]
"""In both orders."""

REFUSED = [(SMOLLM2, ("int8", "FP8-aware training"))]
