"""The tokenizer in a GGUF file's metadata, written as the files that transformers has for it."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from eff_embedded.cache import cached

from eff_serve.engine.gguf.container import GGUFError
from eff_serve.engine.gguf.model import GGUFModel

_VERSION = 1  # of the written files; raise it when they change
_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4  # kinds of tokens
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_SPELT = {**_BYTES, "use_regex": False}


def _split(digits: str) -> dict[str, Any]:
    pattern = {"Regex": _WORDS.format(digits=digits)}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


# Files name how text is cut before merging; they do not spell it out.
_CUTS: dict[str, dict[str, Any]] = {
    "gpt-2": {"pre": [_BYTES]},
    "smollm": {"pre": [{"type": "Digits", "individual_digits": True}, _BYTES]},
    "llama-bpe": {"pre": [_split("{1,3}"), _SPELT], "bos": True, "whole": True},
    "qwen2": {"pre": [_split(""), _SPELT], "normalizer": {"type": "NFC"}},
}
_CUTS |= {"llama3": _CUTS["llama-bpe"], "llama-v3": _CUTS["llama-bpe"], "deepseek-r1-qwen": _CUTS["qwen2"]}


def gguf_folder(model: GGUFModel) -> Path:
    """Folder with tokenizer.json, tokenizer_config.json and config.json of a file; kept under a hash of its header.

    Raises:
        GGUFError: the file has a tokenizer that is not known here, or a damaged one.
    """
    digest = hashlib.sha256(model.file.header).hexdigest()[:24]
    return cached(f"gguf-{digest}-v{_VERSION}", partial(_write, model))


def _write(model: GGUFModel, target: Path) -> None:
    data, path = model.file.metadata, model.path
    tokens, merges = data["tokenizer.ggml.tokens"], data.get("tokenizer.ggml.merges")
    kinds = data.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(kinds) != len(tokens) or not all(isinstance(t, str) for t in tokens):
        raise GGUFError(f"{path}: the tokenizer has {len(tokens)} tokens and {len(kinds)} kinds of them")
    family = data.get("tokenizer.ggml.model")
    try:
        if family == "gpt2":
            made = _of_bytes(data, tokens, kinds, merges, path)
        elif family == "llama":
            made = _of_pieces(data, tokens, kinds, path)
        else:
            raise GGUFError(f"{path} has a tokenizer of the kind {family!r}; those that are read: 'gpt2', 'llama'")
    except (KeyError, TypeError, AttributeError) as error:
        raise GGUFError(f"{path}: the tokenizer in its metadata is damaged: {error}") from error
    special = {}
    for name in ("bos", "eos", "padding", "unknown"):
        number = data.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            special[{"padding": "pad", "unknown": "unk"}.get(name, name) + "_token"] = tokens[number]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    template = data.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    about = {"architectures": [model.config.architecture], "header": hashlib.sha256(model.file.header).hexdigest()}
    for file, value in (("tokenizer.json", made), ("tokenizer_config.json", config), ("config.json", about)):
        (target / file).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _of_bytes(data: dict[str, Any], tokens: list[str], kinds: list[int], merges: Any, path: Path) -> dict[str, Any]:
    """Byte pairs, as in GPT-2."""
    name = data.get("tokenizer.ggml.pre", "gpt-2")
    cut = _CUTS.get("gpt-2" if name == "default" else name)
    if cut is None:
        raise GGUFError(f"{path} cuts text by {name!r}; those that are known: {', '.join(_CUTS)}")
    pairs = [merge.split(" ", 1) for merge in merges or []]
    made = _tokenizer(tokens, kinds, pairs, ignore_merges=cut.get("whole", False))
    pre = {"type": "Sequence", "pretokenizers": cut["pre"]}
    adds_bos = data.get("tokenizer.ggml.add_bos_token", cut.get("bos", False))
    return {
        **made,
        "normalizer": cut.get("normalizer"),
        "pre_tokenizer": pre,
        "post_processor": _bos(data, tokens) if adds_bos else None,
        "decoder": _BYTES,
    }


def _of_pieces(data: dict[str, Any], tokens: list[str], kinds: list[int], path: Path) -> dict[str, Any]:
    """SentencePiece's pairs: what is merged first is said by the scores of the results."""
    scores = data["tokenizer.ggml.scores"]
    if len(scores) != len(tokens):
        raise GGUFError(f"{path}: the tokenizer has {len(tokens)} tokens and {len(scores)} scores")
    number = {token: i for i, token in enumerate(tokens)}
    pairs: list[tuple[float, int, int, list[str]]] = []
    for i, token in enumerate(tokens):
        if kinds[i] == _NORMAL:
            cuts = ((token[:c], token[c:]) for c in range(1, len(token)))
            pairs += [(-scores[i], number[a], number[b], [a, b]) for a, b in cuts if a in number and b in number]
    pairs.sort(key=lambda pair: pair[:3])
    unknown = data.get("tokenizer.ggml.unknown_token_id", 0)
    made = _tokenizer(
        tokens, kinds, [pair for *_, pair in pairs], unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True
    )
    prefix = data.get("tokenizer.ggml.add_space_prefix", True)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    ends: list[dict[str, Any]] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    normalizers = [*([{"type": "Prepend", "prepend": "\u2581"}] if prefix else []), space]
    return {
        **made,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": _bos(data, tokens) if data.get("tokenizer.ggml.add_bos_token", True) else None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *ends]},
    }


def _tokenizer(tokens: list[str], kinds: list[int], merges: list[list[str]], **options: Any) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": tokens[i], **flags, "special": kind != _USER}
        for i, kind in enumerate(kinds)
        if kind in (_UNKNOWN, _CONTROL, _USER) and tokens[i]
    ]
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, **options,
        "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges,
    }  # fmt: skip
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "model": model}


def _bos(data: dict[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    number = data.get("tokenizer.ggml.bos_token_id")
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        return None
    token = tokens[number]
    first, a, b = (
        {"SpecialToken": {"id": token, "type_id": 0}},
        *({"Sequence": {"id": x, "type_id": 0}} for x in "AB"),
    )
    special = {token: {"id": token, "ids": [number], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [first, a], "pair": [first, a, first, b], "special_tokens": special}
