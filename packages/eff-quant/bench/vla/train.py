"""Train the policy of this folder by behaviour cloning, eight minutes on one core; an interrupted run continues.

    python packages/eff-quant/bench/vla/train.py

Writes policy.safetensors (float16) and a record of the training, training.json.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from _policy import WEIGHTS, Policy, training_batch
from _task import episodes
from eff_kernels.testing.machine import device_name
from safetensors.torch import save_file

RECORD = Path(__file__).parent / "training.json"
RATE, WARMUP, SAVE_EVERY, EPISODES = 1.5e-3, 100, 250, 1000


def success_rate(policy: Policy, count: int) -> float:
    """Share of closed-loop episodes that succeed, of seeds that no benchmark uses."""
    policy.eval()
    with torch.no_grad():
        success = episodes(lambda o, noise: policy(**o, noise=noise), count, 1)[0]
    policy.train()
    return round(success.double().mean().item(), 4)


def train_step(policy: Policy, optimizer: torch.optim.Optimizer, batch: int, generator: torch.Generator) -> float:
    """One step on new scenes; returns the loss."""
    observation, actions = training_batch(batch, generator)
    noise, t = torch.randn(actions.shape, generator=generator), torch.rand(batch, generator=generator)
    noisy = (1 - t[:, None, None]) * noise + t[:, None, None] * actions
    loss = (policy.denoised(policy.encode(**observation), noisy, t) - actions).square().mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="of training, all runs together")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()) / "eff_vla_training.pt")
    args = parser.parse_args()
    torch.manual_seed(0)
    policy = Policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, weight_decay=1e-3)
    generator, losses, spent, rates = torch.Generator().manual_seed(0), [], 0.0, {}
    if args.state.exists():
        state = torch.load(args.state)
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        losses, spent, rates = state["losses"], state["spent"], state["rates"]
    while spent < args.seconds:
        start = time.monotonic()
        for _ in range(SAVE_EVERY):
            # The rate falls to zero with time, so that a slower machine ends its run as well.
            done = min(1.0, (spent + time.monotonic() - start) / args.seconds)
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1, (len(losses) + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * done))
            losses.append(train_step(policy, optimizer, args.batch, generator))
        spent += time.monotonic() - start
        rates[len(losses)] = success_rate(policy, 200)
        mean = sum(losses[-SAVE_EVERY:]) / SAVE_EVERY
        print(f"step {len(losses)}: loss {mean:.4f}, success {rates[len(losses)]:.3f}, {spent:.0f} s", flush=True)
        state = {"policy": policy.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
        torch.save(state | {"generator": generator.get_state(), "spent": spent, "rates": rates}, args.state)
    weights = {k: v.half().contiguous() for k, v in policy.state_dict().items()}
    save_file(weights, WEIGHTS)
    policy.load_state_dict({k: v.float() for k, v in weights.items()})
    record = {
        "steps": len(losses),
        "batch": args.batch,
        "seconds": round(spent),
        "optimizer": f"AdamW, rate {RATE}, {WARMUP} steps of warm-up, cosine to zero by time, weight decay 0.001",
        "parameters": sum(p.numel() for p in policy.parameters()),
        "loss": [round(sum(part) / len(part), 5) for part in (losses[i : i + 100] for i in range(0, len(losses), 100))],
        "success_while_training": rates,
        "success": success_rate(policy, EPISODES),
        "versions": {name: version(name) for name in ("torch", "transformers", "diffusers")},
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
