"""What a step of sampling costs with each method, in one run beside plain sampling and diffusers' own guiders.

    uvx nox -s bench -- guidance per_step

One CPU thread, random weights, float32. Steps are taken in turns, round by round, so that other load meets all alike;
a step is a ratio to the plain step of its round, median and 20th to 80th percentile. LayerBind's step is the mean of a
picture of 4 steps (1 with branches, 2 of nursing, 1 plain; two layers of a quarter of the picture each), where the
plain pipeline of 4 steps is the unit. Memory is the largest tensor that is made, and how much more is alive at most
during a step than before it.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from eff_guidance.attencraft import train_projections
from eff_guidance.context_brush import CanvasSpans, apply_incontext_brush
from eff_guidance.head_guidance import SoftPAGConfig, apply_head_guidance, heads_of_layers
from eff_guidance.layerbind import Layer, LayerBindConfig, Layout, LayoutPrompts, Prompt, apply_layerbind
from eff_guidance.pokefusion import StyleAttentionConfig, add_style_attention
from eff_guidance.refam import capture_joint_attention
from eff_kernels.testing import environment
from head_guidance_speed import guided, in_turns, sd3, unet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdRef

RESULTS = Path(__file__).parent / "results" / "per_step.jsonl"
SOURCES = (
    Path(__file__), Path(__file__).with_name("head_guidance_speed.py"), Path(__file__).parents[1] / "src"
)  # fmt: skip
STEPS, ROUNDS, SIDE = 4, 3, 16


class Memory(TorchDispatchMode):
    """The largest tensor made, and the most bytes alive at once of what was made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.most = self.alive = self.calls = 0
        self.known: dict[Any, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self._note(x.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        self.calls += 1
        if self.calls % 50 == 0 or self.alive + storage.nbytes() > self.most:
            for ref in [r for r in self.known if r() is None]:
                self.alive -= self.known.pop(ref)
        ref = WeakIdRef(storage)
        if ref not in self.known:
            self.known[ref] = storage.nbytes()
            self.alive += storage.nbytes()
        self.largest, self.most = max(self.largest, storage.nbytes()), max(self.most, self.alive)


def pipeline_of(transformer: Any) -> Any:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    none = dict.fromkeys(
        ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    )
    vae = AutoencoderKL(block_out_channels=(4,), layers_per_block=1, norm_num_groups=1, latent_channels=4)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **none
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def of_sd3() -> dict[str, Any]:
    """Steps of SD3's class: 3 blocks, 6 heads of 64, 256 picture tokens and 77 of text, by the whole pipeline."""
    from diffusers.models.attention_processor import PAGJointAttnProcessor2_0

    model, given = sd3(blocks=3)
    given["hidden_states"] = torch.randn(1, 4, 2 * SIDE, 2 * SIDE)
    draw = torch.Generator().manual_seed(0)
    words = {"prompt_embeds": torch.randn(1, 77, 64, generator=draw), "pooled_prompt_embeds": torch.randn(1, 64)}
    nothing = {"negative_" + name: torch.randn(x.shape, generator=draw) for name, x in words.items()}
    latents = torch.randn(1, 4, 2 * SIDE, 2 * SIDE, generator=draw)
    layers = tuple(Layer(prompt=str(i), box=(0.25 * i, 0.25 * i, 0.5 + 0.25 * i, 0.5 + 0.25 * i)) for i in range(2))
    prompts = [Prompt(torch.randn(77, 64, generator=draw), torch.randn(64, generator=draw)) for _ in range(3)]

    def runs(scale: float) -> dict[str, Any]:
        def sample(pipe: Any) -> Any:
            more = nothing if scale > 1 else {}
            return pipe(
                **words,
                **more,
                latents=latents,
                height=2 * SIDE,
                width=2 * SIDE,
                num_inference_steps=STEPS,
                guidance_scale=scale,
                output_type="latent",
            )

        def with_(put: Any) -> Any:
            pipe = pipeline_of(copy.deepcopy(model))
            handle = put(pipe)
            if hasattr(handle, "use"):
                handle = handle.use()
                handle.__enter__()
            return lambda: sample(pipe)

        def watched() -> Any:
            pipe = pipeline_of(copy.deepcopy(model))

            def run() -> Any:
                with capture_joint_attention(pipe.transformer):
                    return sample(pipe)

            return run

        six = SoftPAGConfig(heads=tuple((layer, head) for layer in range(3) for head in (0, 3)), strength=0.5)
        layer = SoftPAGConfig(heads=tuple(heads_of_layers(model, 1)), strength=0.5)
        spans = CanvasSpans(grid=(SIDE, SIDE), subjects=((0, 0, SIDE // 2, SIDE),), query=(SIDE // 2, 0, SIDE, SIDE))
        layout = LayoutPrompts(prompts[0], prompts[1:])
        found = {
            "plain": with_(lambda pipe: None),
            "head guidance, 6 heads": with_(lambda pipe: apply_head_guidance(pipe, six)),
            "head guidance, one layer": with_(lambda pipe: apply_head_guidance(pipe, layer)),
            "LayerBind, two layers": with_(
                lambda pipe: apply_layerbind(
                    pipe, Layout(layers=layers), LayerBindConfig(eta1=0.25, hard_blocks=(0,)), prompts=layout
                )
            ),
            "In-Context Brush": with_(lambda pipe: apply_incontext_brush(pipe, spans)),
            "PokeFusion": with_(lambda pipe: add_style_attention(pipe, StyleAttentionConfig(gate_init=0.5))),
            "AttenCraft's concepts": with_(lambda pipe: train_projections(pipe.transformer)),
            "RefAM, maps read": watched(),
        }
        if scale == 1:
            return {**found, "diffusers' SD3 PAG processor, one layer": pag()}
        return {name: found[name] for name in list(found)[:1] + list(found)[2:5]}

    def pag() -> Any:
        own = copy.deepcopy(model)
        own.transformer_blocks[1].attn.set_processor(PAGJointAttnProcessor2_0())
        twice = {k: torch.cat([v, v]) for k, v in given.items()}

        def run() -> None:
            for _ in range(STEPS):
                own(**twice)

        return run

    return {"sd3": measured(runs(1.0), STEPS), "sd3, CFG": measured(runs(4.0), STEPS)}


def of_unet() -> dict[str, Any]:
    """Steps of a UNet beside diffusers' guiders, all with CFG."""
    from diffusers import ClassifierFreeGuidance, PerturbedAttentionGuidance, SkipLayerGuidance, SmoothedEnergyGuidance
    from diffusers.hooks import LayerSkipConfig, SmoothedEnergyGuidanceConfig
    from eff_guidance.head_guidance import SoftPAGGuidance

    model, given = unet()
    prompts = {"encoder_hidden_states": (given["encoder_hidden_states"],) * 2}
    where = "down_blocks.0.attentions.0.transformer_blocks"
    scores = LayerSkipConfig(indices=[0], fqn=where, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    blur = SmoothedEnergyGuidanceConfig(indices=[0], fqn=where)
    whole = LayerSkipConfig(indices=[0], fqn=where, skip_attention=True, skip_ff=True)
    layer = heads_of_layers(model, 0)
    guiders = {
        "plain": ClassifierFreeGuidance(4.0),
        "head guidance, one layer": SoftPAGGuidance(guidance_scale=4.0, heads=layer, strength=0.5),
        "diffusers' PAG": PerturbedAttentionGuidance(4.0, 2.0, 0.0, 1.0, perturbed_guidance_config=scores),
        "diffusers' SEG": SmoothedEnergyGuidance(4.0, 2.0, 9999999.0, True, 0.0, 1.0, seg_guidance_config=blur),
        "diffusers' SkipLayerGuidance": SkipLayerGuidance(4.0, 2.0, 0.0, 1.0, skip_layer_config=whole),
    }
    runs: dict[str, Any] = {}
    for name, guider in guiders.items():
        own = copy.deepcopy(model)
        runs[name] = lambda guider=guider, own=own: guided(guider, own, given, prompts)
    styled = copy.deepcopy(model)
    use = add_style_attention(styled, StyleAttentionConfig(gate_init=0.5)).use()
    use.__enter__()
    runs["PokeFusion"] = lambda: guided(guiders["plain"], styled, given, prompts)
    return {"unet, CFG": measured(runs, 1)}


def measured(runs: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """Milliseconds of a step and its ratio to the plain one of the round, and memory."""
    memory = {}
    for name, run in runs.items():
        print(f"{name}: {time.process_time():.0f} s", flush=True)
        with Memory() as seen:
            run()
        memory[name] = seen.largest, seen.most
    times, ratios = in_turns(runs, ROUNDS)
    return [
        {
            "name": name,
            "ms": round(float(np.median(times[:, k])) / steps, 1),
            "ratio": [round(float(x), 2) for x in np.quantile(ratios[:, k], [0.5, 0.2, 0.8])],
            "largest_mib": round(memory[name][0] / 2**20, 2),
            "alive_mib": round(memory[name][1] / 2**20, 1),
        }
        for k, name in enumerate(runs)
    ]


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    rows = {**of_sd3(), **of_unet()}
    record = {"op": "per_step", "rows": rows, "dtype": "float32", **environment("cpu", SOURCES)}
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    for kind, found in rows.items():
        print(f"\n| {kind} | ms a step | ratio | largest tensor, MiB | alive at most, MiB |\n|---|---|---|---|---|")
        for row in found:
            median, low, high = row["ratio"]
            print(
                f"| {row['name']} | {row['ms']} | {median:.2f} ({low:.2f} to {high:.2f}) | {row['largest_mib']} | "
                f"{row['alive_mib']} |"
            )


if __name__ == "__main__":
    main()
