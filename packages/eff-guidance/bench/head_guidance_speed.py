"""What a step of head guidance costs beside diffusers' own guiders; `head_guidance.py` runs it and keeps the record."""

import copy
import time

import numpy as np
import torch
from eff_guidance.head_guidance import heads_of_layers
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and not func.is_view:
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return out


def in_turns(runs, rounds):
    """Milliseconds of functions in turn, so that a busy machine slows all alike, and as ratios to the first's."""
    times = np.zeros((rounds, len(runs)))
    for at in range(rounds):
        for place, run in enumerate(runs.values()):
            start = time.process_time()
            run()
            times[at, place] = 1e3 * (time.process_time() - start)
    return times, times / times[:, :1]


def measure(runs, rounds=5):
    """Medians and spread of `in_turns`, and the largest tensors."""
    made = []
    for run in runs.values():
        with Largest() as seen:
            run()
        made.append(round(seen.bytes / 2**20, 2))
    times, ratios = in_turns(runs, rounds)
    return [
        {
            "name": name,
            "ms": round(float(np.median(times[:, k])), 1),
            "passes": [round(float(x), 2) for x in np.quantile(ratios[:, k], [0.5, 0.2, 0.8])],
            "largest_mib": made[k],
        }
        for k, name in enumerate(runs)
    ]


def measured(runs):
    """`measure` of those that run; what a peer cannot do is a result too."""
    failed = []
    for name in list(runs):
        try:
            runs[name]()
        except Exception as error:
            failed.append({"name": name, "error": f"{type(error).__name__}: {error}"[:200]})
            del runs[name]
    return measure(runs) + failed


def sd3(blocks=4, heads=6):
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=64, patch_size=2, in_channels=4, num_layers=blocks, attention_head_dim=64,
        num_attention_heads=heads, joint_attention_dim=64, caption_projection_dim=64 * heads, pooled_projection_dim=64,
        out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(1, 4, 64, 64), "encoder_hidden_states": torch.randn(1, 77, 64),
        "pooled_projections": torch.randn(1, 64), "timestep": torch.full((1,), 400.0),
    }  # fmt: skip
    return model.eval(), given


def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=32, block_out_channels=(64, 128), layers_per_block=1, attention_head_dim=(4, 4),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
    )  # fmt: skip
    given = {
        "sample": torch.randn(1, 4, 32, 32),
        "timestep": torch.tensor(400),
        "encoder_hidden_states": torch.randn(1, 77, 64),
    }
    return model.eval(), given


def guided(guider, model, given, prompts):
    guider.set_state(step=1, num_inference_steps=4, timestep=torch.tensor(400))
    batches = guider.prepare_inputs(prompts)
    for batch in batches:
        guider.prepare_models(model)
        batch.noise_pred = model(**{**given, **{n: getattr(batch, n) for n in prompts}}, return_dict=False)[0]
        guider.cleanup_models(model)
    return guider(batches).pred


def speed():
    """Time and largest tensor of one guided step: 1,101 tokens in SD3's class, 1,024 in a UNet's first blocks."""
    from diffusers import PerturbedAttentionGuidance, SkipLayerGuidance, SmoothedEnergyGuidance
    from diffusers.hooks import LayerSkipConfig, SmoothedEnergyGuidanceConfig
    from diffusers.models.attention_processor import PAGJointAttnProcessor2_0
    from eff_guidance.head_guidance import SoftPAGGuidance

    def runs_of(model, given, prompts, guiders):
        runs = {"one pass": lambda: model(**given)}
        for name, guider in guiders.items():
            own = copy.deepcopy(model)  # a guider that raises may leave its hooks behind
            runs[name] = lambda guider=guider, own=own: guided(guider, own, given, prompts)
        return runs

    model, given = sd3(blocks=3)
    prompts = {n: (given[n], given[n]) for n in ("encoder_hidden_states", "pooled_projections")}
    layer = heads_of_layers(model, 1)
    ours = {
        "2 heads": {"heads": [(1, 0), (1, 3)], "strength": 0.5},
        "one layer": {"heads": layer, "strength": 0.5},
        "all heads": {"heads": "all", "strength": 0.5},
        "one layer, image_identity": {"heads": layer, "target": "image_identity"},
        "one layer, image_renorm": {"heads": layer, "target": "image_renorm"},
        "one layer, max": {"heads": layer, "target": "max"},
        "one layer, slerp": {"heads": layer, "strength": 0.5, "path": "slerp"},
    }
    guiders = {f"SoftPAG, {name}": SoftPAGGuidance(guidance_scale=1.0, **more) for name, more in ours.items()}
    guiders["SoftPAG, one layer, with CFG"] = SoftPAGGuidance(guidance_scale=4.0, heads=layer, strength=0.5)
    skip = LayerSkipConfig(indices=[1], fqn="transformer_blocks")
    guiders["diffusers SkipLayerGuidance, with CFG"] = SkipLayerGuidance(4.0, 2.0, 0.0, 1.0, skip_layer_config=skip)
    runs = runs_of(model, given, prompts, guiders)
    pag = copy.deepcopy(model)
    pag.transformer_blocks[1].attn.set_processor(PAGJointAttnProcessor2_0())
    twice = {k: torch.cat([v, v]) for k, v in given.items()}
    runs["diffusers SD3 PAG processor, one layer"] = lambda: pag(**twice)
    rows = {"sd3": measured(runs)}

    model, given = unet()
    prompts = {"encoder_hidden_states": (given["encoder_hidden_states"],) * 2}
    where = "down_blocks.0.attentions.0.transformer_blocks"
    scores = LayerSkipConfig(indices=[0], fqn=where, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    blur = SmoothedEnergyGuidanceConfig(indices=[0], fqn=where)
    whole = LayerSkipConfig(indices=[0], fqn=where, skip_attention=True, skip_ff=True)
    layer = heads_of_layers(model, 0)
    guiders = {
        "SoftPAG, one layer, with CFG": SoftPAGGuidance(guidance_scale=4.0, heads=layer, strength=0.5),
        "SoftPAG, one layer, query_mean, with CFG": SoftPAGGuidance(
            guidance_scale=4.0, heads=layer, target="query_mean"
        ),
        "diffusers PAG, with CFG": PerturbedAttentionGuidance(4.0, 2.0, 0.0, 1.0, perturbed_guidance_config=scores),
        "diffusers SEG, with CFG": SmoothedEnergyGuidance(
            4.0, 2.0, 9999999.0, True, 0.0, 1.0, seg_guidance_config=blur
        ),
        "diffusers SkipLayerGuidance, with CFG": SkipLayerGuidance(4.0, 2.0, 0.0, 1.0, skip_layer_config=whole),
    }
    runs = runs_of(model, given, prompts, guiders)
    rows["unet"] = measured(runs)
    for row in rows["sd3"] + rows["unet"]:
        print(row, flush=True)
    return {"rows": rows}
