"""New words in a pipeline's tokenizers and text encoders, and where they stand in a prompt."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from eff_kernels.edit import Handle
from torch import Tensor, nn

from eff_guidance.attencraft.config import Concept

_PARTS = ("", "_2", "_3")


class NewWords(nn.Module):
    """An embedding with some rows of its own; the others are the old one's and stay as they are.

    The rows are a parameter apart, so that an optimiser's weight decay cannot touch any other word.

    Args:
        base: The embedding of the text encoder.
        ids: Token ids of the new words.
        rows: Their first values, [words, width].
    """

    ids: Tensor

    def __init__(self, base: Any, ids: Sequence[int], rows: Tensor) -> None:
        super().__init__()
        self.base = base
        self.rows = nn.Parameter(rows.clone())
        self.register_buffer("ids", torch.tensor(list(ids)), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The old embedding's weight, which hosts ask for its dtype and device."""
        found: Tensor = self.base.weight
        return found

    @property
    def num_embeddings(self) -> int:
        """Number of the old words."""
        return int(self.base.num_embeddings)

    @property
    def embedding_dim(self) -> int:
        """Width."""
        return int(self.base.embedding_dim)

    def forward(self, input: Tensor) -> Tensor:
        """Embeddings of token ids."""
        new = torch.eq(input[..., None], self.ids)
        # Ids behind the old table would be out of its range.
        out: Tensor = self.base(input.masked_fill(new.any(-1), 0))
        return torch.where(new.any(-1)[..., None], self.rows[new.int().argmax(-1)].to(out.dtype), out)


@dataclass(slots=True)
class WordHandle:
    """New words of a pipeline.

    Attributes:
        rows: By text encoder ("text_encoder", ...), the parameter that holds the words, [words, width].
        handle: Takes them back.
    """

    rows: dict[str, nn.Parameter]
    handle: Handle

    def remove(self) -> None:
        """Give the pipeline its tokenizers and embeddings back."""
        self.handle.remove()


def add_words(pipe: Any, concepts: Sequence[Concept]) -> WordHandle:
    """Teach a pipeline's tokenizers the concepts' tokens, and give each text encoder rows for them.

    The tokenizers are exchanged for copies; the embedding is wrapped by `NewWords`.

    Raises:
        ValueError: a token exists already, an initial word has more than one piece, or there is no text encoder.
    """
    handle, rows = Handle(), {}
    try:
        for part in _PARTS:
            tokenizer, encoder = getattr(pipe, f"tokenizer{part}", None), getattr(pipe, f"text_encoder{part}", None)
            if tokenizer is None or encoder is None:
                continue
            rows[f"text_encoder{part}"] = _add(pipe, part, tokenizer, encoder, concepts, handle)
        if not rows:
            raise ValueError(f"{type(pipe).__name__} has no text encoder that could learn a word")
    except Exception:
        handle.remove()
        raise
    return WordHandle(rows, handle)


def _add(
    pipe: Any, part: str, tokenizer: Any, encoder: Any, concepts: Sequence[Concept], handle: Handle
) -> nn.Parameter:
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    if there := [c.token for c in concepts if c.token in known]:
        raise ValueError(f"{there} are tokens of tokenizer{part} already; use others")
    base = encoder.get_input_embeddings()
    first = [_piece(tokenizer, c.init_word) for c in concepts]
    larger = copy.deepcopy(tokenizer)
    # lstrip: the space before belongs to the word, as it does for other words of byte-level vocabularies.
    larger.add_tokens([AddedToken(c.token, lstrip=True, normalized=False) for c in concepts])
    ids = larger.convert_tokens_to_ids([c.token for c in concepts])
    start = base.weight.detach()[torch.tensor(first, device=base.weight.device)].float()
    new = NewWords(base, ids, start).to(base.weight.device)
    encoder.set_input_embeddings(new)
    handle.on_remove(lambda: encoder.set_input_embeddings(base))
    setattr(pipe, f"tokenizer{part}", larger)
    handle.on_remove(lambda: setattr(pipe, f"tokenizer{part}", tokenizer))
    return new.rows


def _piece(tokenizer: Any, word: str) -> int:
    """The id of a word of one piece, preferably as it stands behind a space."""
    for text in (f" {word}", word):
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            return ids[0]
    raise ValueError(
        f"init_word={word!r} has {len(ids)} pieces: {tokenizer.convert_ids_to_tokens(ids)}; use a word of one piece"
    )


def spans(tokens: Sequence[str], concepts: Sequence[Concept]) -> dict[int, list[int]]:
    """Where concepts stand in a prompt: for each that occurs its columns, the new word's first.

    The columns of a concept with further words are those that follow as long as they are pieces of these words. A
    concept may occur in several text encoders' tokens, one behind the other.

    Raises:
        ValueError: no concept occurs.
    """
    found: dict[int, list[int]] = {}
    for i, concept in enumerate(concepts):
        heads = [n for n, token in enumerate(tokens) if _bare(token) == concept.token]
        found |= {i: list(heads)} if heads else {}
        for start in heads if concept.words else ():
            end, words = start + 1, concept.words.lower().split()
            while end < len(tokens) and any(_bare(tokens[end]).lower() in word for word in words if _bare(tokens[end])):
                found[i].append(end)
                end += 1
    if not found:
        raise ValueError(f"none of {[c.token for c in concepts]} is in the prompt {list(tokens)}")
    return found


def _bare(token: str) -> str:
    return token.removesuffix("</w>").strip("\u2581\u0120 ")
