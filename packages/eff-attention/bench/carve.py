"""Why CARVE does what it does to SmolLM2 with eyes: where its maps point, and what a second look makes of an answer.

    uvx nox -s bench -- attention carve [--pictures 40] [--parts maps tokens views captions] [--threads 1]
    uvx nox -s bench -- attention carve --table
    uvx nox -s bench -- attention carve --draw docs/images/carve.png

Crowded collages whose true outlines are known; one question about an object that is there and one about the missing
partner of another. "maps": by layers, does the highest score lie on the object that is asked for, how well does the
mask fit it, how much of it does it keep; beside the question's attention without contrast, and beside the score of
another picture. "views": right answers from the picture, from CARVE's crop, from a crop around the true outline (of
the partner that is there where the object is not), from one around another object, and from both pictures. "captions":
the same for a request to describe the picture, where the true outline is that of all objects. One line for each
variant goes to results/carve.jsonl, with 95 % bootstrap intervals over pictures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from eff_attention.contrastive_focus import (
    attention_regions,
    carve_answer,
    contrast_attention,
    fuse_attention,
    mask_crop_resize,
    record_image_attentions,
)
from eff_attention.contrastive_focus.answer import prompts
from eff_attention.contrastive_focus.config import CarveConfig
from eff_embedded.collages import everyday_pairs, sample
from eff_embedded.eyes import load_smollm2_eyes
from eff_embedded.eyes.evaluation import DESCRIBE, FIRST_SEED, WORLDS, tempting
from eff_embedded.eyes.scores import ratio, score_caption
from eff_kernels.edit.attention import decoder_attention, observe_attention, rows
from eff_kernels.testing.records import environment
from PIL import Image

RESULTS = Path(__file__).parent / "results" / "carve.jsonl"
LAYERS = {"18 to 23": range(18, 24), "6 to 11": range(6, 12), "12 to 17": range(12, 18), "24 to 29": range(24, 30)}
LAYERS |= {str(layer): (layer,) for layer in range(30)}
LOOKS = {"black": {}, "kept": {"keep_outside": True, "keep_ratio": True}}
CONFIG = CarveConfig()


class Case:
    """A collage with its questions: (text, answer, number of the object that a perfect map points at)."""

    def __init__(self, number):
        self.collage = sample(FIRST_SEED + number, WORLDS["crowded contrary"])
        self.picture = Image.fromarray(self.collage.picture)
        self.size = self.picture.height, self.picture.width
        partner = {a: b for x, y, _ in everyday_pairs() for a, b in ((x, y), (y, x))}
        given = self.collage.questions(kinds=("exists",), absent=tempting(self.collage), synonyms=0.0)
        self.questions = []
        for wanted in ("yes", "no"):
            for q in [q for q in given if q.answer == wanted][:1]:
                name = q.asked[0] if wanted == "yes" else partner.get(q.asked[0])
                if name in self.collage.names:
                    self.questions.append((q.text, wanted, self.collage.names.index(name)))

    def outline(self, number):
        return torch.from_numpy(np.asarray(self.collage.visible[number]))


class Model:
    """Batches of prompts about pictures."""

    def __init__(self, dtype):
        self.model, self.processor = load_smollm2_eyes(dtype=getattr(torch, dtype))
        self.yes, self.no = (self.processor.tokenizer(w, add_special_tokens=False).input_ids[0] for w in ("Yes", "No"))

    def maps(self, pictures, texts, tokens, layers):
        inputs = prompts(self.processor, [[p] for p in pictures], texts)
        return record_image_attentions(self.model, inputs, layers, max_new_tokens=tokens)

    @torch.no_grad()
    def answers(self, shown, texts):
        """Whether "Yes" is likelier than "No" as the first word, for each list of pictures."""
        last = self.model(**prompts(self.processor, shown, texts), logits_to_keep=1).logits[:, -1]
        return ["yes" if yes else "no" for yes in (last[:, self.yes] > last[:, self.no]).tolist()]

    @torch.no_grad()
    def told(self, pictures):
        inputs = prompts(self.processor, [[p] for p in pictures], [DESCRIBE] * len(pictures))
        out = self.model.generate(**inputs, max_new_tokens=40, do_sample=False)
        return self.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def score_of(own, general, case, layers, contrast=True):
    """Score of the pixels from some of the recorded layers, by their place in the record."""
    here = own.maps[:, list(layers)]
    maps = contrast_attention(here, general.maps[:, list(layers)], CONFIG.lam) if contrast else here[:16]
    return fuse_attention(maps, own.grid, case.size, time=CONFIG.time)


def region(score):
    return attention_regions(score, CONFIG.top_p, CONFIG.max_regions)


class Sums:
    """Numerators and denominators by name and picture."""

    def __init__(self):
        self.kept = {}

    def add(self, variant, figure, picture, value, count=1.0):
        pair = self.kept.setdefault(variant, {}).setdefault(figure, {}).setdefault(picture, [0.0, 0.0])
        pair[0] += float(value)
        pair[1] += float(count)

    def figures(self, variant):
        found = {}
        for name, pairs in self.kept[variant].items():
            hits, counts = zip(*pairs.values(), strict=True)
            found[name] = ratio(hits, counts).to_dict()
        return found


def rate(sums, variant, picture, score, seen, mask=True):
    """How a score fits an outline."""
    sums.add(variant, "pointing", picture, seen.flatten()[int(score.argmax())])
    if not mask:
        return
    mask = region(score)
    both = float((mask & seen).sum())
    sums.add(variant, "iou", picture, both / float((mask | seen).sum()))
    sums.add(variant, "object_kept", picture, both / float(seen.sum()))
    sums.add(variant, "mask_share", picture, mask.float().mean())
    sums.add(variant, "object_share", picture, seen.float().mean())


def batches(items, size=16):
    return [items[i : i + size] for i in range(0, len(items), size)]


def attention(model, asked, layers, tokens=4):
    """For questions [(number, case, text, ...)]: their own maps, and those under the general request."""
    own = [
        m
        for some in batches(asked)
        for m in model.maps([q[1].picture for q in some], [q[2] for q in some], tokens, layers)
    ]
    cases = {q[0]: q[1] for q in asked}
    general = []
    for some in batches(list(cases.values())):
        general += model.maps([c.picture for c in some], [CONFIG.general] * len(some), 16, layers)
    by_case = dict(zip(cases, general, strict=True))
    return [(m, by_case[q[0]]) for q, m in zip(asked, own, strict=True)]


def maps_part(model, cases, sums):
    asked = [(i, c, *q) for i, c in enumerate(cases) for q in c.questions if q[1] == "yes"]
    before = None
    for (i, case, _, _, number), (own, general) in zip(asked, attention(model, asked, range(30)), strict=True):
        seen = case.outline(number)
        for name, layers in LAYERS.items():
            score = score_of(own, general, case, layers)
            several = len(layers) > 1
            rate(sums, f"contrast, {name}", i, score, seen, several)
            rate(sums, f"question, {name}", i, score_of(own, general, case, layers, contrast=False), seen, several)
            if name == "18 to 23":
                if before is not None:
                    rate(sums, "of another picture", i, before, seen)
                before = score


def tokens_part(model, cases, sums):
    names, config = decoder_attention(model.model), model.model.config
    for i, case in enumerate(cases):
        for text, wanted, number in case.questions:
            inputs = prompts(model.processor, [[case.picture]], [text])
            ids = inputs["input_ids"][0]
            place = (ids == config.image_token_id).nonzero()[:, 0]
            behind = list(range(int(place[-1]) + 1, len(ids)))
            noun = noun_of(model.processor.tokenizer, ids[behind].tolist(), case.collage.names[number])
            if wanted != "yes" or noun is None:
                continue
            seen, weights = case.outline(number), {}
            with torch.no_grad(), observe_attention(model.model, keep_rows(weights, behind, place), where=names):
                model.model(**inputs, logits_to_keep=1)
            for layer, found in weights.items():
                for name, query in (("noun", noun), ("last token", len(behind) - 1)):
                    looks = torch.cat([found[:, query], found[:, query].mean(0, keepdim=True)]).view(-1, 1, 9, 9)
                    scores = torch.nn.functional.interpolate(looks, size=case.size, mode="bilinear").flatten(1)
                    right = seen.flatten()[scores.argmax(1)]
                    sums.add(f"{name}, {layer}", "pointing", i, right[-1])
                    sums.add(f"{name}, {layer}", "object_share", i, seen.float().mean())
                    for head, hit in enumerate(right[:-1]):
                        sums.add(f"{name}, {layer}", f"head_{head}", i, hit)


def keep_rows(weights, queries, place):
    def keep(call, output):
        weights[call.layer] = rows(call, queries)[0][:, :, place].float()

    return keep


def noun_of(tokenizer, ids, name):
    """Index of the last token of the object's name in the question."""
    words = [tokenizer.decode([i]).strip() for i in ids]
    last = name.split()[-1]
    return max((i for i, w in enumerate(words) if w and last.endswith(w)), default=None)


def pictures_of(case, mask):
    """What a second look may show for a mask: name -> pictures."""
    looks = {name: mask_crop_resize(case.picture, mask, **more)[0] for name, more in LOOKS.items()}
    shown = {name: [refined] for name, refined in looks.items()}
    return shown | {f"{name}, both pictures": [case.picture, refined] for name, refined in looks.items()}


def views_part(model, cases, sums):
    asked = [(i, c, *q) for i, c in enumerate(cases) for q in c.questions]
    views = {"plain": [[case.picture] for _, case, *_ in asked]}
    for (_, case, _, _, number), (own, general) in zip(asked, attention(model, asked, range(18, 24)), strict=True):
        other = next(j for j in range(len(case.collage.names)) if j != number and bool(case.outline(j).any()))
        masks = {
            "CARVE": region(score_of(own, general, case, range(6))),
            "true outline": case.outline(number),
            "another object": case.outline(other),
        }
        for kind, mask in masks.items():
            for look, shown in pictures_of(case, mask).items():
                views.setdefault(f"{kind}, {look}", []).append(shown)
    for name, shown in views.items():
        said = []
        for some, questions in zip(batches(shown), batches(asked), strict=True):
            said += model.answers(some, [q[2] for q in questions])
        for (i, _, _, wanted, _), answer in zip(asked, said, strict=True):
            sums.add(name, "right", i, answer == wanted)
            sums.add(name, f"right_{wanted}", i, answer == wanted)


def captions_part(model, cases, sums):
    asked = [(i, c, DESCRIBE) for i, c in enumerate(cases)]
    views = {"plain": [case.picture for case in cases]}
    for (i, case, _), (own, general) in zip(asked, attention(model, asked, range(18, 24), 16), strict=True):
        mask, objects = region(score_of(own, general, case, range(6))), torch.from_numpy(case.collage.labels > 0)
        sums.add("CARVE, black", "mask_on_objects", i, (mask & objects).sum(), mask.sum())
        sums.add("CARVE, black", "object_share", i, objects.float().mean())
        for kind, chosen in {"CARVE": mask, "true outline": objects}.items():
            for look in LOOKS:
                views.setdefault(f"{kind}, {look}", []).append(pictures_of(case, chosen)[look][0])
    for name, pictures in views.items():
        told = [text for some in batches(pictures) for text in model.told(some)]
        for i, (case, text) in enumerate(zip(cases, told, strict=True)):
            score = score_caption(text, case.collage.names)
            sums.add(name, "chair_i", i, len(score.wrong), len(score.named))
            sums.add(name, "recall", i, len(score.there & score.named), len(score.there))


PARTS = {"maps": maps_part, "tokens": tokens_part, "views": views_part, "captions": captions_part}


def measure(args):
    torch.set_num_threads(args.threads)
    about = environment("cpu", (Path(__file__), Path(__file__).parents[1] / "src"))
    model, cases = Model(args.dtype), [Case(i) for i in range(args.pictures)]
    for part in args.parts:
        sums = Sums()
        PARTS[part](model, cases, sums)
        with RESULTS.open("a") as file:
            for variant in sums.kept:
                record = {"part": part, "variant": variant, "pictures": args.pictures, "first_seed": FIRST_SEED}
                record |= sums.figures(variant) | {"dtype": args.dtype} | about
                file.write(json.dumps(record) + "\n")
                print(part, variant, {k: v["value"] for k, v in record.items() if isinstance(v, dict)}, flush=True)


def table():
    """The tables of docs/methods/contrastive_focus.md, from the last record of each variant."""
    last = {}
    for line in RESULTS.read_text().splitlines():
        record = json.loads(line)
        last[record["part"], record["variant"]] = record

    def share(r, name):
        return f"{100 * r[name]['value']:.0f} ({100 * r[name]['low']:.0f} to {100 * r[name]['high']:.0f})"

    figures = {
        "maps": ("pointing", "iou", "object_kept"),
        "views": ("right", "right_yes", "right_no"),
        "captions": ("chair_i", "recall"),
    }
    for part, names in figures.items():
        print(f"\n| {part} | {' | '.join(names)} |\n| --- |{' --- |' * len(names)}")
        for (of, variant), record in last.items():
            if of == part and not variant.rpartition(", ")[2].isdigit():
                print(f"| {variant} | {' | '.join(share(record, n) for n in names)} |")
    for kind in ("contrast", "question", "noun", "last token"):
        single = [r for (_, v), r in last.items() if v.startswith(kind) and v.rpartition(", ")[2].isdigit()]
        best = max(single, key=lambda r: r["pointing"]["value"])
        print(f"\nbest single layer, {kind}: {best['variant']} points right in {share(best, 'pointing')} %")


def draw(path):
    """Contrast and crop on collages and on photographs."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from eff_embedded.data.photographs import photograph

    model = Model("float32")
    cases = [Case(i) for i in (3, 5)]
    rows = [(case.picture, case.questions[0][0]) for case in cases]
    for name, question in (("cat", "Is there a cat?"), ("coffee", "Is there a cup?"), ("rocket", "Is there a rocket?")):
        picture = photograph(name)
        picture.thumbnail((400, 400))
        rows.append((picture, question))
    figure, axes = plt.subplots(len(rows), 5, figsize=(11, 2.3 * len(rows)), layout="constrained")
    for line, (picture, question) in zip(axes, rows, strict=True):
        out = carve_answer(model.model, model.processor, picture, question, CarveConfig(suffix="", final="refined"))
        looks = []
        for text, tokens in ((CONFIG.general, 16), (question, 4)):
            (seen,) = model.maps([picture], [text], tokens, None)
            looks.append(fuse_attention(seen.maps, seen.grid, (picture.height, picture.width)))
        shown = [picture, *looks, out.score, out.refined]
        answers = out.original_answer, out.answer
        titles = [f"{question} {answers[0]}", "general request", "question", "contrast", f"mask and crop: {answers[1]}"]
        for axis, image, title in zip(line, shown, titles, strict=True):
            axis.imshow(image, cmap="magma")
            axis.set_title(title[:44], fontsize=7)
            axis.set_axis_off()
    figure.savefig(path, dpi=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--draw", type=Path)
    args = parser.parse_args()
    if args.table:
        table()
    elif args.draw:
        draw(args.draw)
    else:
        measure(args)


if __name__ == "__main__":
    main()
