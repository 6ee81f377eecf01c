"""SmolLM2 with eyes before and after SENTINEL, beside DPO on whole captions with as many pairs and updates.

    uvx nox -s bench -- adapters sentinel [--images 100] [--pictures 80]

Pictures hold four to six objects, and objects that go together never come together, so that habits of the training
mislead. Detectors are the layouts of the pictures with errors: each denies or invents one name in twenty. Captions are
greedy; pairs come from other pictures than the evaluation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from eff_adapters.sentinel import (
    CDPOConfig,
    ContextPreferenceCollator,
    ObjectTable,
    Sentence,
    SentenceSampler,
    SentinelConfig,
    SentinelDataBuilder,
    add_lora,
    answer_prefix,
    train_c_dpo,
)
from eff_kernels.testing import environment

RESULTS = Path(__file__).parent / "results" / "sentinel.jsonl"
QUESTION = "Describe the picture."
BUILD_SEED, JUDGED_SEED = 3 * 10**7, 2 * 10**7
ERROR = 0.05


class WholeCaptions(SentenceSampler):
    """Samples whole answers in the place of sentences: pairs of them are those of plain DPO."""

    @torch.no_grad()
    def __call__(self, image, question, context, *, n, seed):
        inputs = self.processor(images=[image], text=[answer_prefix(self.processor, question)], return_tensors="pt")
        inputs = inputs.to(self.model.dtype)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            out = self.model.generate(**inputs, do_sample=True, num_return_sequences=n, **self.options)
        texts = self.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [Sentence(text.strip(), True) for text in texts]


def detector(number: int):
    """The names of a picture, with errors that depend on detector, picture and name alone."""

    def ask(picture, names):
        def wrong(name):
            drawn = hashlib.sha256(f"{number} {picture.info['seed']} {name}".encode()).digest()
            return int.from_bytes(drawn[:4], "little") < ERROR * 2**32

        return {name: (name in picture.info["names"]) != wrong(name) for name in names}

    return ask


def picture(seed: int, world):
    from eff_embedded import collages
    from PIL import Image

    collage = collages.sample(seed, world)
    made = Image.fromarray(collage.picture)
    made.info.update(seed=seed, names=frozenset(collage.names))
    return made


def judged(model, processor, world, pictures: int) -> dict:
    from eff_embedded import collages
    from eff_embedded.eyes.scores import answers, caption_figures, score_caption

    some = [collages.sample(JUDGED_SEED + i, world) for i in range(pictures)]
    told = answers(model, processor.tokenizer, [(c, QUESTION) for c in some])
    figures = caption_figures([score_caption(t, c.names) for t, c in zip(told, some, strict=True)])
    words = sum(len(t.split()) for t in told) / len(told)
    return {**{n: i.to_dict() for n, i in figures.items()}, "words": round(words, 2), "first": told[:3]}


def run(kind: str, args: argparse.Namespace, world) -> dict:
    from eff_embedded import collages
    from eff_embedded.eyes import load_smollm2_eyes

    model, processor = load_smollm2_eyes(dtype=torch.bfloat16)
    if kind == "before":
        return judged(model, processor, world, args.pictures)
    table = ObjectTable({t.name: (*t.synonyms, *t.also) for t in collages.things().values()})
    whole = kind == "whole captions"
    sampler = (WholeCaptions if whole else SentenceSampler)(model, processor, max_new_tokens=40)
    numbers = SentinelConfig(seed=args.seed, max_sentences=1 if whole else 3, retries=0)
    builder = SentinelDataBuilder(sampler, table, [detector(0), detector(1)], numbers)
    examples, counts, begun, images = [], Counter[str](), time.process_time(), 0
    while len(examples) < args.pairs and images < args.images:
        image = picture(BUILD_SEED + images, world)
        built = builder.build(image, QUESTION, image_id=str(images))
        examples += [(image, pair) for pair in built.pairs]
        counts.update(built.counts)
        images += 1
    examples, built_s = examples[: args.pairs], time.process_time() - begun
    config = CDPOConfig(
        lora_r=args.rank, lora_alpha=2 * args.rank, lr=args.lr, batch_size=4, micro_batch_size=4, epochs=args.epochs
    )
    adapted, begun = add_lora(model, config), time.process_time()
    log = train_c_dpo(adapted, ContextPreferenceCollator(processor), examples, config)
    return {
        **judged(adapted.get_base_model(), processor, world, args.pictures),
        "pairs": len(examples), "pairs_behind_a_context": sum(bool(p.context) for _, p in examples), "images": images,
        "counts": counts, "build_cpu_s": round(built_s), "train_cpu_s": round(time.process_time() - begun),
        "losses": [round(u.loss, 3) for u in log], "margin": round(log[-1].margin, 3), "config": config.to_dict(),
    }  # fmt: skip


def main() -> None:
    from eff_embedded.eyes.evaluation import WORLDS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100, help="most pictures that pairs are built from")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--world", default="crowded contrary", choices=sorted(WORLDS))
    parser.add_argument("--pictures", type=int, default=80, help="pictures of the evaluation")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", default=["before", "sentences", "whole captions"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", FutureWarning)
    sources = Path(__file__), Path(__file__).parents[1] / "src" / "eff_adapters" / "sentinel"
    about = {
        **environment("cpu", sources), "dtype": "bfloat16", "seed": args.seed, "world": args.world,
        "pictures": args.pictures,
    }  # fmt: skip
    for kind in args.kinds:
        entry = {"kind": kind, **about, **run(kind, args, WORLDS[args.world])}
        print(json.dumps(entry))
        with RESULTS.open("a") as file:
            file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
