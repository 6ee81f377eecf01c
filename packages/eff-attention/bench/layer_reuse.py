"""Profile SmolLM2-135M-Instruct for layer reuse, search policies, and draw them.

    uvx nox -s bench -- attention layer_reuse [--threads 2]

The texts are two parts of Python's manual, other ones than that on which ``apps/eff-serve/bench/layer_reuse.py``
compares policies. The profile is kept next to the records; a second run searches and draws from it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from eff_attention.layer_reuse import (
    ReuseProfile,
    plot_policy,
    plot_sensitivity,
    profile_layer_reuse,
    search_policy,
)
from rich.progress import Progress

RESULTS = Path(__file__).parent / "results"
CONTEXTS = ((300_000, 4096), (420_000, 7936))  # where the text begins, in characters, and its tokens
SIZES = {"block_size": 32, "top_k": 1024, "sink_tokens": 32, "recent_tokens": 64, "shared_heads": True, "steps": 64}


def measure() -> ReuseProfile:
    from eff_embedded.language import smollm2_folder
    from eff_serve.models.tokenizer import Tokenizer
    from transformers import AutoModelForCausalLM

    folder = smollm2_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    manual, found = "\n".join(topics.values()), []
    tokenizer = Tokenizer(folder)
    for start, length in CONTEXTS:
        tokens = tokenizer.encode(manual[start : start + 6 * length])[:length]
        with Progress() as bars:
            bar = bars.add_task(f"{length} tokens")
            found.append(
                profile_layer_reuse(
                    model,
                    torch.tensor([tokens]),
                    **SIZES,
                    progress=lambda done, total, bars=bars, bar=bar: bars.update(bar, completed=done, total=total),
                )
            )
    return ReuseProfile.merge(found)


def draw(profile: ReuseProfile, policy, folder: Path) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "eff"
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", width_ratios=(1.1, 1))
    image = plot_policy(axes[0], profile, policy)
    figure.colorbar(image, ax=axes[0], label="overlap of the chosen blocks")
    plot_sensitivity(axes[1], profile)
    figure.savefig(folder / "layer_reuse_profile.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    parser.add_argument("--theta", type=float, nargs="*", default=(0.6, 0.7, 0.75, 0.8))
    parser.add_argument("--recommend", type=float, default=0.75, help="theta of the policy that is saved and drawn")
    parser.add_argument("--sensitive", type=int, default=3, help="layers with the largest KL that stay full in it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = RESULTS / "layer_reuse_smollm2_profile.safetensors"
    if not path.is_file():
        measure().save(path)
    profile = ReuseProfile.load(path)
    diffuse = profile.ratio90.mean((0, 2)).argsort()[::-1][:3].tolist()
    for theta in args.theta:
        print(f"theta {theta}: {search_policy(profile, theta=theta).summary()}")
    for ratio in (0.1, 0.2, 0.3):
        policy = search_policy(profile, "max_min", compute_ratio=ratio)
        print(f"max_min {ratio}: overlap {policy.score:.2f}, {policy.summary()}")
    print(f"most diffuse layers: {diffuse}; largest KL alone: {profile.kl.argsort()[::-1][:8].tolist()}")
    sensitive = profile.kl.argsort()[::-1][: args.sensitive].tolist()
    policy = search_policy(
        profile, "any_source", theta=args.recommend, force_full=(0, 1, -1, *sensitive), head_merge="mean"
    )
    print(f"recommended: {policy.summary()}")
    policy.save(RESULTS / "layer_reuse_smollm2.json")
    draw(profile, policy, args.images)


if __name__ == "__main__":
    main()
