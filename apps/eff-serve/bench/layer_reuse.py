"""Layer reuse on SmolLM2-135M at 8k tokens: ``quality`` beside other ways to read few keys, ``speed`` beside dense.

    python apps/eff-serve/bench/layer_reuse.py quality POLICY.json --top-k 1024
    python apps/eff-serve/bench/layer_reuse.py needles POLICY.json --top-k 1024
    python apps/eff-serve/bench/layer_reuse.py speed POLICY.json --top-k 1024 --threads 1
    python apps/eff-serve/bench/layer_reuse.py prompt POLICY.json --top-k 1024 --threads 1
    python apps/eff-serve/bench/layer_reuse.py draw

The prompt is Python's manual with sixteen planted facts. It is prefilled once, dense, and kept in ``--cache``; every
method then decodes the same tokens from it, teacher-forced: 192 tokens of the text that goes on, the planted numbers,
and passages of the prompt again (copying by induction). "needles" plants one fact in a prompt, at sixteen depths.
"prompt" reads the prompt itself with the policy, times that, and decodes the same tokens with the policy from it.
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
from _long_context import bits_per_byte, copied, digits_found, fresh, long_prompt, needles_found, prefilled
from eff_attention.caches import cache_kwargs
from eff_attention.layer_reuse import (
    LayerReuseConfig,
    LayerReusePolicy,
    apply,
    apply_layer_reuse,
    choose_blocks,
    growing_cache,
)
from eff_embedded.language import SMOLLM2_NAME, smollm2_folder
from eff_kernels import decode_attention, scored_decode_attention
from eff_kernels.testing import Provider, Recorder, same
from eff_serve.engine.decoder import PAGE, Decoder
from eff_serve.engine.reuse import LayerReuse

RESULTS = Path(__file__).parent / "results"
PACKAGES = (Path(__file__).parents[1] / "src", Path(eff_kernels.__file__).parent, Path(eff_attention.__file__).parent)


def dense(layers):
    """Every layer an anchor that nobody reuses: dense attention by our kernel once `every_layer` takes them in."""
    return LayerReusePolicy(kind=("anchor",) * layers, source=(-1,) * layers, score=1.0, meta={})


def previous(policy):
    """The same layers dense at both ends as the policy has, and one anchor for all between."""
    first = next(i for i, s in enumerate(policy.source) if s >= 0) - 1
    last = max(i for i, s in enumerate(policy.source) if s >= 0)
    source = [first if first < i <= last else -1 for i in range(len(policy.source))]
    kind = ["reuse" if s >= 0 else "anchor" if i == first else "full" for i, s in enumerate(source)]
    return LayerReusePolicy(kind=tuple(kind), source=tuple(source), score=0.0, meta={})


def alone(model, config, ends, choose):
    """All layers but ``ends`` attend to what ``choose(mass)`` makes of their own weights: a bench of upper bounds."""
    layers = model.config.num_hidden_layers
    handle = apply_layer_reuse(model, dense(layers), config)
    runtime = runtime_of(model)
    runtime.anchors = set(range(layers))
    state = {"layer": 0}

    def scored(q, k, v, lengths, **options):
        out, mass = scored_decode_attention(q, k, v, lengths, **options)
        layer, state["layer"] = state["layer"], (state["layer"] + 1) % layers
        if layer in ends:
            return out, mass
        index, kept = choose_blocks(choose(mass), lengths.tolist(), config)
        rows = (index * config.block_size).to(torch.int32)
        return decode_attention(q, k, v, kept, block_table=rows, run=config.block_size, scale=options["scale"]), mass

    apply.scored_decode_attention = scored
    handle.on_remove(lambda: setattr(apply, "scored_decode_attention", scored_decode_attention))
    return handle


def runtime_of(model):
    from transformers import AttentionInterface

    return AttentionInterface._global_mapping[model.config._attn_implementation].__self__


def recent(mass):
    """The later the heavier: with the first block forced, the window of StreamingLLM."""
    return torch.arange(mass.size(2), dtype=mass.dtype).expand(mass.shape).clone()


def kv_bytes(config, model, lengths_of_layers):
    """Bytes of keys and values that one decoding step reads."""
    c = model.config
    return sum(lengths_of_layers) * 2 * c.num_key_value_heads * c.head_dim * 2


def index_bytes(config, model, selector):
    """Bytes of a layer's index for each key: a mean in float32 for each block, or 128 bits."""
    c = model.config
    per_head = {"pooled": 4 * c.head_dim / config.block_size, "hash": 16}
    return c.num_key_value_heads * per_head.get(selector, 0)


def methods(model, policy, config):
    """What is compared: a function that attaches each, and how many layers of it read few keys."""
    layers = len(policy.source)
    ends = {0, 1, layers - 1}
    of = {
        "dense": lambda: alone(model, config, set(range(layers)), recent),
        "sink and recent keys": lambda: alone(model, config, ends, recent),
        "every layer by itself": lambda: alone(model, config, ends, lambda mass: mass),
        "one anchor for all": lambda: apply_layer_reuse(model, previous(policy), config),
        "searched policy": lambda: apply_layer_reuse(model, policy, config),
    }
    for name in ("pooled", "hash"):
        chosen = dataclasses.replace(config, selector=name)
        of[f"searched policy, {name}"] = lambda chosen=chosen: apply_layer_reuse(model, policy, chosen)
    sparse = {"dense": 0, "sink and recent keys": layers - 3, "every layer by itself": layers - 3}
    sparse["one anchor for all"] = sum(s >= 0 for s in previous(policy).source)
    sparse["searched policy"] = sum(s >= 0 for s in policy.source)
    choosing = {s for s in policy.source if s >= 0}
    few = sparse["searched policy"] + sum(policy.kind[i] == "anchor" for i in choosing)
    sparse |= {"searched policy, pooled": few, "searched policy, hash": few}
    return of, sparse


def found_needles(options, model, tokenizer, policy, config):
    """Facts that stand alone in a prompt, at sixteen depths."""
    of, sparse = methods(model, policy, config)
    rows = []
    for name, attach in of.items():
        if options.only and name not in options.only:
            continue
        with attach():
            whole, single, bits = needles_found(model, options.folder, options.length, options.cache, tokenizer)
        row = {"method": name, "top_k": config.top_k, "length": options.length, "needles_found": whole}
        row |= {"dense_layers": len(policy.source) - sparse[name], "digits_found": single, "bits_per_digit": bits}
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def losses(model, kept, tokenizer, following, tokens):
    """What a model makes of the text that goes on, of the planted numbers, and of passages of the prompt again."""
    numbers, digit_bits = digits_found(model, kept, tokenizer)
    same_token, copy_bits = copied(model, kept, tokens)
    return {
        "bits_per_byte": bits_per_byte(model, kept, tokenizer, following[:193]),
        "numbers_exact": numbers,
        "bits_per_digit": digit_bits,
        "copied_tokens": same_token,
        "bits_per_copied_token": copy_bits,
    }


def quality(options, model, kept, tokenizer, following, policy, config):
    layers, n, k = len(policy.source), options.length, config.top_k
    of, sparse = methods(model, policy, config)
    rows = []
    for name, attach in of.items():
        if options.only and name not in options.only:
            continue
        # A layer that chooses for itself reads all keys, and the values of k.
        each = (n + k) / 2 if name == "every layer by itself" else k
        read = kv_bytes(config, model, [n] * (layers - sparse[name]) + [each] * sparse[name])
        read += index_bytes(config, model, name.rpartition(" ")[2]) * n * (sparse[name] - sparse["searched policy"])
        with attach():
            found = losses(model, kept, tokenizer, following, options.tokens)
        row = {
            "method": name,
            "top_k": k,
            "block_size": config.block_size,
            "shared_heads": config.shared_heads,
            "length": n,
            "dense_layers": layers - sparse[name],
            "kv_bytes_per_token": int(read),
            **found,
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def growing(model, kept):
    """A cache that holds the prompt and grows in place."""
    cache = growing_cache(model.config)
    for layer, (keys, values) in enumerate(kept):
        cache.update(keys, values, layer)
    return cache


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
        good = {name: same(f(), truth, tolerance=0.5) for name, f in runs.items()}
        providers = [Provider(name, lambda _, f=f: f(), check=lambda name=name: good[name]) for name, f in runs.items()]
        recorder.run(f"{n} tokens, k {config.top_k}", providers, mode="decode", rounds=options.rounds)
    print(recorder.table("transformers"))


def prompt(options, model, tokenizer, following, policy, config):
    """Seconds to read the prompt in one piece, dense and by the policy, and what decoding from each loses."""
    from transformers import DynamicCache

    rows, config = [], dataclasses.replace(config, phase="both")
    for name in ("dense", "searched policy"):
        own = copy.deepcopy(model)
        if name != "dense":
            apply_layer_reuse(own, policy, config)
        seconds = []
        for _ in range(options.rounds):
            cache = DynamicCache(config=model.config)
            start = time.perf_counter()
            with torch.inference_mode():
                own(torch.tensor([options.tokens]), **cache_kwargs(own, cache), logits_to_keep=1)
            seconds.append(time.perf_counter() - start)
        kept = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        row = {
            "method": name,
            "top_k": config.top_k,
            "length": options.length,
            "threads": options.threads,
            "seconds": sorted(seconds)[len(seconds) // 2],
            **losses(own, kept, tokenizer, following, options.tokens),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def draw():
    """What each method loses on text and in finding a needle, against the bytes that a step reads."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "eff"
    records = {
        what: [json.loads(line) for line in (RESULTS / f"layer_reuse_{what}.jsonl").read_text().splitlines()]
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
            axis.plot(row["kv_bytes_per_token"] / 1e6, value, "o", color=f"C{i}", label=name)  # one colour in both
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
        rows = prompt(options, model, tokenizer, following, policy, config)
    elif options.what == "needles":
        rows = found_needles(options, model, tokenizer, policy, config)
    else:
        rows = quality(options, model, kept, tokenizer, following, policy, config)
    if not options.dry:
        path = RESULTS / f"layer_reuse_{options.what}.jsonl"
        with path.open("a") as file:
            file.writelines(json.dumps({**row, "model": SMOLLM2_NAME, "dtype": "bfloat16"}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
