"""Score collage diffusion: how many pictures of two objects are as asked, and how long one takes. Prints JSON.

python tools/collage_diffusion_evaluate.py [--pairs 400] [--model FOLDER] [--out FILE]
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from eff_embedded.diffusion import TRANSFORMER, VAE, collage_pipeline, judged, load_collage_diffusion, pairs
from eff_embedded.judge import JUDGE, load_judge


def main() -> None:
    """Evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=400, help="prompts about two objects with a relation")
    parser.add_argument("--model", type=Path, help="folder of an exported transformer; default: the shipped one")
    parser.add_argument("--guidance", type=float, nargs="+", default=[4.0], help="scales to score")
    parser.add_argument("--out", type=Path, help="file to write to as well")
    args = parser.parse_args()
    pipe = exported(args.model) if args.model else load_collage_diffusion()
    judge = load_judge()
    record: dict[str, Any] = {"vae": VAE, "judge": JUDGE, "transformer": str(args.model or TRANSFORMER), "steps": 20}
    record["seconds_per_picture"] = seconds(pipe)
    record["guidance"] = {
        str(scale): dataclasses.asdict(judged(pipe, judge, pairs(args.pairs), guidance_scale=scale), dict_factory=plain)
        for scale in args.guidance
    }
    text = json.dumps(record, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def seconds(pipe: Any) -> dict[str, float]:
    """Time of one picture of 20 steps with guidance, the best of three, by number of threads."""
    held, found = torch.get_num_threads(), {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        times = []
        for seed in range(4):
            start = time.perf_counter()
            pipe("a dog to the left of an apple", seed=seed)
            times.append(time.perf_counter() - start)
        found[f"{threads} threads"] = round(min(times[1:]), 2)
    torch.set_num_threads(held)
    return found


def exported(folder: Path) -> Any:
    """The pipeline around a transformer that ``eff-train export`` wrote."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from eff_embedded.checkpoints import checkpoint
    from safetensors.torch import load_file

    scale = load_file(folder / "prompts.safetensors")
    return collage_pipeline(
        SD3Transformer2DModel.from_pretrained(folder, torch_dtype=torch.float32),
        AutoencoderKL.from_pretrained(checkpoint(VAE).folder, torch_dtype=torch.float32),
        FlowMatchEulerDiscreteScheduler.from_pretrained(folder),
        scale["mean"],
        scale["std"],
    )


def plain(pairs_: list[tuple[str, Any]]) -> dict[str, Any]:
    """Estimates as share, low and high, rounded."""
    return {
        key: {n: round(v, 4) for n, v in value._asdict().items()} if hasattr(value, "_asdict") else value
        for key, value in pairs_
    }


if __name__ == "__main__":
    main()
