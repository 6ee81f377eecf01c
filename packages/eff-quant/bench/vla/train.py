"""Train the policy of this folder by behaviour cloning, twenty seconds on one core; an interrupted run continues.

    python packages/eff-quant/bench/vla/train.py --seconds 19

Writes policy.safetensors (float16) and a record of the training.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import torch
from _policy import WEIGHTS, Policy, training_batch
from _task import episodes
from safetensors.torch import save_file

RECORD = Path(__file__).parent / "training.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=18, help="time of this run")
    parser.add_argument("--steps", type=int, default=400, help="steps after which the learning rate is zero")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()) / "eff_vla_training.pt")
    args = parser.parse_args()
    torch.manual_seed(0)
    policy = Policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=1e-3)
    generator, done, losses, spent = torch.Generator().manual_seed(0), 0, [], 0.0
    if args.state.exists():
        state = torch.load(args.state)
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        done, losses, spent = state["done"], state["losses"], state["spent"]
    start = time.monotonic()
    while time.monotonic() - start < args.seconds and done < args.steps:
        rate = min(1, (done + 1) / 50) * 0.5 * (1 + math.cos(math.pi * done / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate
        observation, actions = training_batch(args.batch, generator)
        features = policy.encode(**observation)
        noise, t = torch.randn(actions.shape, generator=generator), torch.rand(args.batch, generator=generator)
        noisy = (1 - t[:, None, None]) * noise + t[:, None, None] * actions
        loss = (policy.denoised(features, noisy, t) - actions).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        done += 1
        if done % 100 == 0:
            print(f"step {done}: loss {sum(losses[-100:]) / 100:.4f}, {time.monotonic() - start:.0f} s", flush=True)
    spent += time.monotonic() - start
    torch.save(
        {
            "policy": policy.state_dict(),
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
            "done": done,
            "losses": losses,
            "spent": spent,
        },
        args.state,
    )
    save_file({k: v.half().contiguous() for k, v in policy.state_dict().items()}, WEIGHTS)
    with torch.no_grad():
        success = episodes(lambda o, noise: policy.eval()(**o, noise=noise), 200, 1)[0]
    record = {
        "steps": done,
        "batch": args.batch,
        "seconds": round(spent),
        "loss": [round(sum(losses[i : i + 50]) / len(losses[i : i + 50]), 5) for i in range(0, len(losses), 50)],
        "success": success.float().mean().item(),
        "torch": torch.__version__,
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
