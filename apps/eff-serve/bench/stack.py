"""Memory and speed of SmolLM2-135M as methods are stacked on it: float32, int8, layer reuse, an adapter, steering.

    python apps/eff-serve/bench/stack.py POLICY.json --length 2048 --top-k 512

Each step reads the same prompt and decodes the same tokens after it. A step is right if taking its method back gives
the logits of the step before bit for bit (of stored weights: if they are near those of float32).
"""

import argparse
import itertools
import json
import math
import time
from pathlib import Path
from pydoc_data.topics import topics

import eff_attention
import eff_kernels
import eff_quant
import peft
import torch
from eff_attention.layer_reuse import LayerReuseConfig, LayerReusePolicy, apply_layer_reuse, growing_cache
from eff_attention.sink_calibration import ACTConfig, apply_act
from eff_embedded import load_smollm2
from eff_embedded.language import SMOLLM2_NAME
from eff_kernels import Handle
from eff_kernels.edit.caches import cache_kwargs
from eff_kernels.testing import environment, weight_bytes
from eff_quant import Int8Config, quantize_

RESULTS = Path(__file__).parent / "results" / "stack.jsonl"
SOURCES = (Path(__file__), *(Path(p.__file__).parent for p in (eff_kernels, eff_quant, eff_attention)))
ROUNDED = {"int8": 0.1}  # how far logits may be from those of float32
WARM = 8


def adapter(model):
    """LoRA of rank 8 on queries and values, as one that has been trained has it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data.mul_(0.02)
    handle = Handle()
    handle.on_remove(adapted.unload)
    return handle


@torch.no_grad()
def measure(model, prompt, following, tokenizer):
    """Seconds for the prompt, milliseconds a token (median, and fifths), bits a byte."""
    cache, start = growing_cache(model.config), time.perf_counter()
    for piece in torch.tensor(prompt).split(512):
        model(piece[None], **cache_kwargs(model, cache), use_cache=True, logits_to_keep=1)
    prefill, times, nats = time.perf_counter() - start, [], 0.0
    for token, wanted in itertools.pairwise(following):
        start = time.perf_counter()
        logits = model(torch.tensor([[token]]), **cache_kwargs(model, cache), use_cache=True).logits[0, -1]
        times.append(1e3 * (time.perf_counter() - start))
        nats -= float(logits.float().log_softmax(-1)[wanted])
    times = sorted(times[WARM:])
    low, middle, high = (times[int(share * (len(times) - 1))] for share in (0.2, 0.5, 0.8))
    size = len(tokenizer.decode(following[1:]).encode())
    return prefill, (low, middle, high), nats / math.log(2) / size


@torch.no_grad()
def probe(model, prompt):
    """Logits of the prompt's beginning."""
    return model(torch.tensor([prompt[:64]]), use_cache=False).logits


def steps(policy, top_k):
    """Name, whether the step starts from float32, and what it applies."""
    config = LayerReuseConfig(top_k=top_k, min_seq_len=top_k)
    reuse = lambda model: apply_layer_reuse(model, policy, config, order=0)  # noqa: E731
    steering = lambda model: apply_act(model, ACTConfig(), order=1)  # noqa: E731
    yield "float32", True, None
    yield "int8", True, lambda model: quantize_(model, Int8Config())
    yield "+ layer reuse", False, reuse
    yield "+ LoRA", False, adapter
    yield "+ sink calibration", False, steering


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("policy", type=Path)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--top-k", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    policy = LayerReusePolicy.load(options.policy)
    model, tokenizer = load_smollm2(dtype=torch.float32)
    manual = tokenizer("\n".join(topics.values())[:40_000], verbose=False).input_ids
    prompt, following = manual[: options.length], manual[options.length : options.length + options.tokens + 1]
    plain = probe(model, prompt)
    about = environment("cpu", SOURCES)
    for name, fresh, apply in steps(policy, options.top_k):
        if fresh and apply is not None:
            model, _ = load_smollm2(dtype=torch.float32)
        before = probe(model, prompt)
        handle = None if apply is None else apply(model)
        found = probe(model, prompt)
        if fresh:
            ok = bool((found - plain).norm() <= ROUNDED.get(name, 0.0) * plain.norm())
        else:
            handle.remove()
            ok = torch.equal(probe(model, prompt), before)
            apply(model)
        prefill, (low, middle, high), bits = measure(model, prompt, following, tokenizer)
        layers, n = len(policy.source), options.length
        few = sum(s >= 0 for s in policy.source) if "+" in name and "sink" not in name else 0
        keys = n * (layers - few) + options.top_k * few
        read = keys * 2 * model.config.num_key_value_heads * model.config.head_dim * 4
        record = {
            "step": name, "weights_mb": weight_bytes(model) / 1e6, "kv_read_mb": read / 1e6, "prefill_s": prefill,
            "ms": middle, "ms_p20": low, "ms_p80": high, "bits_per_byte": bits, "length": n, "top_k": options.top_k,
            "tokens": options.tokens, "model": SMOLLM2_NAME, "dtype": "float32", "seed": 0, "checked": True, "ok": ok,
            **about,
        }  # fmt: skip
        print({k: v for k, v in record.items() if k not in about}, flush=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
