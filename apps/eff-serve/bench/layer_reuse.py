"""Layer reuse on SmolLM2-135M at 8k tokens: ``quality`` beside other ways to read few keys, ``speed`` beside dense.

    python apps/eff-serve/bench/layer_reuse.py quality POLICY.json --top-k 1024
    python apps/eff-serve/bench/layer_reuse.py needles POLICY.json --top-k 1024
    python apps/eff-serve/bench/layer_reuse.py speed POLICY.json --top-k 1024 --threads 1
    python apps/eff-serve/bench/layer_reuse.py prompt POLICY.json --top-k 1024 --threads 1
    python apps/eff-serve/bench/layer_reuse.py draw

The prompt is Python's manual with sixteen planted facts. It is prefilled once, dense, and kept in ``--cache``; every
method then decodes the same tokens from it, teacher-forced: 96 tokens of the text that goes on, and six passages of
the prompt again (copying by induction). "prompt too" has read the prompt itself with the policy, which "prompt" times.
"needles" plants one fact in a prompt, at eight depths.
Each method is checked first: where it may read all blocks but one it must give the logits of the untouched model.
"""

import argparse
import copy
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import eff_attention
import eff_kernels
import torch
from _few_keys import index_bytes, kv_bytes, methods
from _long_context import bits_per_byte, copied, fresh, growing, long_prompt, needles_found, prefilled
from eff_attention.layer_reuse import LayerReuseConfig, LayerReusePolicy, apply_layer_reuse
from eff_embedded.language import SMOLLM2_NAME, smollm2_folder
from eff_kernels.edit.caches import cache_kwargs
from eff_kernels.testing import Provider, Recorder, same
from eff_kernels.testing.records import environment
from eff_serve.engine.decoder import PAGE, Decoder
from eff_serve.engine.reuse import LayerReuse

RESULTS = Path(__file__).parent / "results"
BFLOAT16, OTHER = 0.05, 0.25  # how far logits may be from bfloat16's: by rounding, by int8 or by keys left out
PROMPT_TOO = "searched policy, prompt too"
PACKAGES = (Path(__file__).parents[1] / "src", Path(eff_kernels.__file__).parent, Path(eff_attention.__file__).parent)


@torch.no_grad()
def right(model, kept, name, policy, config, token):
    """Whether a method that may read all blocks but one gives nearly the logits of the untouched model.

    bfloat16 moves them by 1 to 3 %, a wrong mask or position by half (see decode.py).
    """
    n, block = kept[0][0].size(2) + 1, config.block_size
    most = (n - 1) // block * block
    free = dataclasses.replace(config, top_k=most, min_seq_len=most)

    def logits():
        cache = fresh(model, kept)
        return model(torch.tensor([[token]]), **cache_kwargs(model, cache)).logits[0, -1].float()

    wanted = logits()
    with methods(model, policy, free)[0][name]():
        found = logits()
    print(f"{name}: {float((found - wanted).norm() / wanted.norm()):.4f} from the untouched model", flush=True)
    return same(found, wanted, tolerance=BFLOAT16)


def found_needles(options, model, kept, tokenizer, following, policy, config):
    """Facts that stand alone in a prompt, at sixteen depths."""
    of, sparse = methods(model, policy, config)
    for name, attach in of.items():
        if options.only and name not in options.only:
            continue
        ok = right(model, kept, name, policy, config, following[0])
        with attach():
            found = needles_found(model, options.folder, options.length, options.cache, tokenizer)
        yield {
            "method": name,
            "top_k": config.top_k,
            "length": options.length,
            "dense_layers": len(policy.source) - sparse[name],
            **found,
            "ok": ok,
        }


def losses(model, kept, tokenizer, following, tokens):
    """What a model makes of the text that goes on, and of passages of the prompt again."""
    same_token, copy_bits = copied(model, kept, tokens)
    return {
        "bits_per_byte": bits_per_byte(model, kept, tokenizer, following[:97]),
        "copied_tokens": same_token,
        "bits_per_copied_token": copy_bits,
    }


def quality(options, model, kept, tokenizer, following, policy, config):
    layers, n, k = len(policy.source), options.length, config.top_k
    of, sparse = methods(model, policy, config)
    both = dataclasses.replace(config, phase="both")
    for name in (*of, PROMPT_TOO):
        if options.only and name not in options.only:
            continue
        if name == PROMPT_TOO:
            begun, plain = read_by_policy(model, options.tokens, policy, both), "searched policy"
            ok = near(model, begun, kept, following[0])
        else:
            begun, plain = kept, name
            ok = right(model, kept, name, policy, config, following[0])
        # A layer that chooses for itself reads all keys, and the values of k.
        each = (n + k) / 2 if name == "every layer by itself" else k
        read = kv_bytes(model, [n] * (layers - sparse[plain]) + [each] * sparse[plain])
        read += index_bytes(config, model, name.rpartition(" ")[2]) * n * (sparse[plain] - sparse["searched policy"])
        with of[plain]():
            found = losses(model, begun, tokenizer, following, options.tokens)
        yield {
            "method": name,
            "top_k": k,
            "block_size": config.block_size,
            "shared_heads": config.shared_heads,
            "length": n,
            "dense_layers": layers - sparse[plain],
            "kv_megabytes": read / 1e6,
            **found,
            "ok": ok,
        }


def read_by_policy(model, tokens, policy, config):
    """Keys and values of a prompt in one piece; ``policy`` None: dense."""
    from transformers import DynamicCache

    own, cache = copy.deepcopy(model), DynamicCache(config=model.config)
    if policy is not None:
        apply_layer_reuse(own, policy, config)
    with torch.inference_mode():
        own(torch.tensor([tokens]), **cache_kwargs(own, cache), logits_to_keep=1)
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


@torch.no_grad()
def near(model, found, wanted, token, tolerance=OTHER):
    """Whether the logits after a prompt that was read in another way are near those of the untouched model."""
    a, b = (
        model(torch.tensor([[token]]), **cache_kwargs(model, fresh(model, kept))).logits[0, -1].float()
        for kept in (found, wanted)
    )
    print(f"the prompt read in another way: {float((a - b).norm() / b.norm()):.4f}", flush=True)
    return same(a, b, tolerance=tolerance)


def speed(options, model, kept, following, policy, config):
    recorder = Recorder("layer_reuse", None if options.dry else RESULTS / "layer_reuse.jsonl", sources=PACKAGES)
    layers, n = len(policy.source), options.length
    token = following[0]

    def transformers_step(plan, make=fresh, settings=config):
        own, cache = copy.deepcopy(model), make(model, kept)
        if plan is not None:
            apply_layer_reuse(own, plan, settings)

        @torch.no_grad()
        def run():
            logits = own(torch.tensor([[token]]), **cache_kwargs(own, cache)).logits[0].float()
            if settings.selector == "exact":
                cache.crop(-1)  # an index of keys has to see them grow
            return logits

        return run

    decoder = Decoder(options.folder, quantize="int8", num_pages=-(-(n + 1) // PAGE))
    for layer, pair in enumerate(kept):
        for pages, rows in zip((decoder.keys[layer], decoder.values[layer]), pair, strict=True):
            full = torch.nn.functional.pad(rows[0].float(), (0, 0, 0, decoder.num_pages * PAGE - n))
            pages.copy_(full.unflatten(1, (-1, PAGE)).transpose(0, 1))
    table = torch.arange(decoder.num_pages, dtype=torch.int32)[None]
    reuse, pooled = (
        LayerReuse(policy, dataclasses.replace(config, selector=name), num_layers=layers, page=PAGE)
        for name in ("exact", "pooled")
    )
    counts = (n - torch.arange(decoder.num_pages) * PAGE).clamp(max=PAGE)
    for layer in range(layers):
        pooled.wrote(layer, decoder.keys[layer], torch.arange(decoder.num_pages), counts)

    def eff_step(used):
        def run():
            decoder.reuse = used
            return decoder.decode(torch.tensor([token]), torch.tensor([n]), table)

        return run

    runs = {
        "transformers": transformers_step(None),
        "transformers, growing cache": transformers_step(None, growing),
        "transformers, layer reuse": transformers_step(policy),
        "transformers, both": transformers_step(policy, growing),
        **{
            f"transformers, both, {name}": transformers_step(
                policy, growing, dataclasses.replace(config, selector=name)
            )
            for name in ("pooled", "hash")
        },
        "eff-serve": eff_step(None),
        "eff-serve, layer reuse": eff_step(reuse),
        "eff-serve, layer reuse, pooled": eff_step(pooled),
    }
    with torch.inference_mode():
        truth = runs["transformers"]().clone()
        apart = {name: float((f() - truth).norm() / truth.norm()) for name, f in runs.items()}
        print({name: round(error, 4) for name, error in apart.items()})
        # The bounds of decode.py. The yardstick is compared with the same model on a cache of another make.
        apart["transformers"] = apart["transformers, growing cache"]
        limits = {name: OTHER if "eff" in name or "reuse" in name or "both" in name else BFLOAT16 for name in runs}
        providers = [
            Provider(name, lambda _, f=f: f(), check=lambda name=name: apart[name] <= limits[name])
            for name, f in runs.items()
        ]
        recorder.run(f"{n} tokens, k {config.top_k}", providers, mode="decode", rounds=options.rounds)
    print(recorder.table("transformers"))


def prompt(options, model, kept, tokenizer, following, policy, config):
    """Seconds to read the prompt in one piece, dense and by the policy."""
    config = dataclasses.replace(config, phase="both")
    for name, plan in (("dense", None), ("searched policy", policy)):
        if options.only and name not in options.only:
            continue
        seconds = []
        for _ in range(options.rounds):
            start = time.perf_counter()
            read = read_by_policy(model, options.tokens, plan, config)
            seconds.append(time.perf_counter() - start)
        yield {
            "method": name,
            "top_k": config.top_k,
            "length": options.length,
            "threads": options.threads,
            "seconds": sorted(seconds)[len(seconds) // 2],
            "rounds": len(seconds),
            "ok": near(model, read, kept, following[0], BFLOAT16 if plan is None else OTHER),
        }


def draw():
    """What each method loses on text and in finding a needle, against the bytes that a step reads."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "eff"
    records = {
        what: [
            row
            for row in map(json.loads, (RESULTS / f"layer_reuse_{what}.jsonl").read_text().splitlines())
            if row["ok"] and row["commit"] and row["dirty"] is False
        ]
        for what in ("quality", "needles")
    }
    digits = {(r["method"], r["top_k"]): r["digits_found"] for r in records["needles"]}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, row in enumerate(records["quality"]):
        found = digits.get((row["method"], row["top_k"]))
        for axis, value in zip(axes, (row["bits_per_byte"], found), strict=True):
            if value is None:
                continue
            name = row["method"] + (f", {row['top_k']} keys" if row["method"].startswith("searched") else "")
            axis.plot(row["kv_megabytes"], value, "o", color=f"C{i}", label=name)  # one colour in both
    axes[0].set(ylabel="bits per byte of the text that goes on")
    axes[1].set(ylabel="digits of the needles found", ylim=(0, 1))
    for axis in axes:
        axis.set(xlabel="MB of keys and values read per token", xlim=(0, 195))
    axes[0].legend()
    path = Path(__file__).parents[3] / "docs" / "images" / "layer_reuse.svg"
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("quality", "needles", "speed", "prompt", "draw"))
    parser.add_argument("policy", type=Path, nargs="?")
    parser.add_argument("--length", type=int, default=7900)
    parser.add_argument("--top-k", type=int, default=1024)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--shared-heads", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--dry", action="store_true", help="do not write the record")
    options = parser.parse_args()
    if options.what == "draw":
        draw()
        return
    if options.policy is None:
        parser.error(f"{options.what} needs a policy")
    torch.set_num_threads(options.threads)
    from transformers import AutoModelForCausalLM

    options.folder = smollm2_folder(progress=False)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.bfloat16).eval()
    options.tokens, following, tokenizer = long_prompt(options.folder, options.length)
    kept = prefilled(model, options.tokens, options.cache / f"layer_reuse_{options.length}.pt")
    policy = LayerReusePolicy.from_dict(json.loads(options.policy.read_text()))
    config = LayerReuseConfig(
        top_k=options.top_k,
        block_size=options.block_size,
        min_seq_len=options.top_k,
        shared_heads=options.shared_heads,
    )
    if options.what == "speed":
        speed(options, model, kept, following, policy, config)
        return
    if options.what == "prompt":
        rows = prompt(options, model, kept, tokenizer, following, policy, config)
    elif options.what == "needles":
        rows = found_needles(options, model, kept, tokenizer, following, policy, config)
    else:
        rows = quality(options, model, kept, tokenizer, following, policy, config)
    common = {"model": SMOLLM2_NAME, "dtype": "bfloat16", "checked": True, **environment("cpu", PACKAGES)}
    for row in rows:
        line = json.dumps({**row, **common})
        print(line, flush=True)
        if not options.dry:
            with (RESULTS / f"layer_reuse_{options.what}.jsonl").open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
