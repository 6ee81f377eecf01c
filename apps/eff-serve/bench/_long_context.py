"""Long prompts with planted facts, their dense prefill kept on disk, and teacher-forced decoding from it."""

import math
from pathlib import Path
from pydoc_data.topics import topics

import torch
from eff_attention.layer_reuse import growing_cache
from eff_kernels.edit.caches import cache_kwargs
from eff_serve.models.tokenizer import Tokenizer
from rich.progress import track

THINGS = (
    "apple", "river", "castle", "garden", "window", "bridge", "forest", "candle",
    "mirror", "ladder", "basket", "hammer", "pillow", "rocket", "saddle", "violin",
)  # fmt: skip


def facts():
    """A name and a number of four digits each, from a seed."""
    generator = torch.Generator().manual_seed(5)
    numbers = torch.randint(1000, 10000, (len(THINGS),), generator=generator).tolist()
    return dict(zip(THINGS, numbers, strict=True))


def sentences(tokenizer):
    """The sentence of each fact in tokens."""
    return {t: tokenizer.encode(f"\nThe secret number of the {t} is {n}.\n") for t, n in facts().items()}


def read(model, cache, tokens, path: Path):
    """Prefill tokens into a cache, and keep its keys and values on disk."""
    for piece in torch.tensor(tokens).split(512):
        model(piece[None], **cache_kwargs(model, cache), logits_to_keep=1)
    torch.save([(layer.keys, layer.values) for layer in cache.layers], path)


def long_prompt(folder, length):
    """Tokens of Python's manual with the facts spread over it, evenly by depth: ``length`` in all."""
    tokenizer = Tokenizer(folder)
    manual = tokenizer.encode("\n".join(topics.values())[:200_000])
    planted = list(sentences(tokenizer).values())
    between = (length - sum(map(len, planted))) // (len(planted) + 1)
    tokens = []
    for i, fact in enumerate(planted):
        tokens += manual[i * between : (i + 1) * between] + fact
    used = len(planted) * between
    rest = length - len(tokens)
    return tokens + manual[used : used + rest], manual[used + rest :], tokenizer


def question(tokenizer, thing, number):
    """What is asked, and the digits that are to follow."""
    asked = tokenizer.encode(f"\nThe secret number of the {thing} is")
    whole = tokenizer.encode(f"\nThe secret number of the {thing} is {number}")
    return asked, whole[len(asked) :]


@torch.no_grad()
def prefilled(model, tokens, path: Path):
    """Keys and values of the prompt, computed once; a list of pairs [1, KV, n, d]."""
    from transformers import DynamicCache

    if not path.is_file():
        read(model, DynamicCache(config=model.config), tokens, path)
    return torch.load(path)


def fresh(model, kept):
    """A cache that holds the prompt and can grow."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(kept):
        cache.update(keys, values, layer)
    return cache


def growing(model, kept, rows=1):
    """A cache that holds the prompt in each row and grows in place, which gives what ``fresh`` gives in less time."""
    cache = growing_cache(model.config)
    for layer, (keys, values) in enumerate(kept):
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
    return cache


@torch.no_grad()
def forced(model, kept, rows):
    """Log-probabilities [rows, n - 1, vocab] after each token but the last of rows of n tokens, one by one."""
    tokens, cache = torch.tensor(rows), growing(model, kept, len(rows))
    steps = [model(column[:, None], **cache_kwargs(model, cache)).logits[:, -1] for column in tokens[:, :-1].T]
    return torch.stack(steps, 1).float().log_softmax(-1)


def bits_per_byte(model, kept, tokenizer, tokens):
    """Of the text that goes on after the prompt."""
    (scores,) = forced(model, kept, [tokens])
    nats = -scores.gather(1, torch.tensor(tokens[1:])[:, None]).sum()
    return float(nats) / math.log(2) / len(tokenizer.decode(tokens[1:]).encode())


def answered(model, kept, tokenizer, thing, number):
    """Which digits of the answer are the likeliest, and the nats of all of them."""
    asked, digits = question(tokenizer, thing, number)
    scores = forced(model, kept, [asked + digits])[0, len(asked) - 1 :]
    wanted = torch.tensor(digits)
    return scores.argmax(1) == wanted, -float(scores.gather(1, wanted[:, None]).sum())


def copied(model, kept, tokens, passages=6, known=16, length=40):
    """Passages of the prompt once more: share of tokens that are the likeliest, and bits per token, after ``known``."""
    apart = (len(tokens) - 400) // passages
    again = torch.tensor(tokens)[200:].unfold(0, length, apart)[:passages]
    scores, wanted = forced(model, kept, again.tolist())[:, known - 1 :], again[:, known:]
    nats = -scores.gather(2, wanted[..., None]).mean()
    return float((scores.argmax(2) == wanted).float().mean()), float(nats) / math.log(2)


@torch.no_grad()
def needles(model, folder, length, where: Path):
    """For every second fact a prompt that holds it alone, at eight depths: (thing, number, keys and values).

    The text around is the same, so that what comes before a fact is read once for all.
    """
    tokenizer = Tokenizer(folder)
    manual = tokenizer.encode("\n".join(topics.values())[:200_000])
    planted = sentences(tokenizer)
    plain = prefilled(model, manual[:length], where / f"haystack_{length}.pt")
    chosen = list(enumerate(facts().items()))[::2]
    for i, (thing, number) in track(chosen, f"needles in {length} tokens"):
        path = where / f"needle_{length}_{i}.pt"
        if not path.is_file():
            at = round(length * (i + 0.5) / len(planted))
            cache = fresh(model, [(k[:, :, :at], v[:, :, :at]) for k, v in plain])
            read(model, cache, planted[thing] + manual[at : length - len(planted[thing])], path)
        yield thing, number, torch.load(path, mmap=True)


def needles_found(model, folder, length, where, tokenizer):
    """How many needles there are, those whose four digits are all the likeliest, share and mean bits of digits."""
    needle, whole, single, nats, count = 0, 0, 0, 0.0, 0
    for thing, number, kept in needles(model, folder, length, where):
        hits, loss = answered(model, kept, tokenizer, thing, number)
        needle, whole, single = needle + 1, whole + bool(hits.all()), single + int(hits.sum())
        nats, count = nats + loss, count + len(hits)
    return {
        "needles": needle,
        "needles_found": whole,
        "digits_found": single / count,
        "bits_per_digit": nats / math.log(2) / count,
    }
