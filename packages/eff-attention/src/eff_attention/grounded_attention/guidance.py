"""Guidance away from what the text alone would say (PAI, Liu and others, ECCV 2024, arXiv 2407.21771, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from eff_kernels.edit.attention import find_decoder
from eff_kernels.edit.caches import cache_kwargs
from torch import Tensor


class TextGuidance:
    """A logits processor: gamma (log p with pictures - log p without) + log p without, among likely tokens alone.

    It is made for one ``generate``, reads the prompt without its pictures once, and then each new token with a cache of
    its own. Tokens whose probability with pictures is below ``cutoff`` times the largest are ruled out. Use it as
    ``model.generate(**inputs, logits_processor=[TextGuidance(model, inputs, gamma=1.1)])``.

    Args:
        model: A picture-language model.
        inputs: The same inputs, with input_ids [B, T] and attention_mask.
        gamma: 1 changes nothing but the cutoff.
        cutoff: 0 rules nothing out.

    Raises:
        ValueError: a number is out of range, or there are no input_ids.
        NotImplementedError: prompts of the model see themselves whole (PaliGemma).
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any], *, gamma: float = 1.1, cutoff: float = 0.1) -> None:
        if not math.isfinite(gamma) or gamma < 0:
            raise ValueError(f"gamma={gamma}; use a finite number of 0 or more")
        if not 0 <= cutoff <= 1:
            raise ValueError(f"cutoff={cutoff}; use 0 to 1")
        if inputs.get("input_ids") is None:
            raise ValueError("inputs must hold input_ids")
        if model.config.model_type == "paligemma":
            raise NotImplementedError("prompts of PaliGemma see themselves whole; TextGuidance reads them causally")
        self.gamma, self.cutoff = gamma, cutoff
        self._model: Any = model
        self._decoder: Any = find_decoder(model)
        self._ids, self._mask = _without_pictures(model, inputs)
        self._length = inputs["input_ids"].shape[1]
        self._cache: Any = None
        self._seen: Tensor | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Guided scores [B, V] for the next token."""
        here = scores.float().log_softmax(-1)
        there = self._text_logits(input_ids).float().log_softmax(-1).to(here.device)
        guided = self.gamma * (here - there) + there
        if self.cutoff:
            guided = guided.masked_fill(here < here.amax(-1, keepdim=True) + math.log(self.cutoff), -torch.inf)
        return guided.to(scores.dtype)

    def _text_logits(self, input_ids: Tensor) -> Tensor:
        """Logits [B, V] of the sequences without their pictures."""
        from transformers import DynamicCache

        times = input_ids.shape[0] // len(self._ids)
        ids, mask = (x.to(input_ids.device).repeat_interleave(times, 0) for x in (self._ids, self._mask))
        new = input_ids[:, self._length :]
        whole = torch.cat([ids, new], 1)
        mask = torch.cat([mask, torch.ones_like(new)], 1)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        going_on = self._seen is not None and torch.equal(self._seen, whole[:, :-1])
        if not going_on:  # the first token, or beams have changed places
            self._cache = DynamicCache(config=self._decoder.config)
        start = whole.shape[1] - 1 if going_on else 0
        out = self._decoder(
            input_ids=whole[:, start:],
            attention_mask=mask,
            position_ids=position[:, start:],
            use_cache=True,
            **cache_kwargs(self._decoder, self._cache),
        )
        self._seen = whole
        logits: Tensor = self._model.get_output_embeddings()(out.last_hidden_state[:, -1])
        cap = getattr(self._model.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)


def _without_pictures(model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, S] without picture tokens, padded on the left."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    drop = torch.zeros_like(ids, dtype=torch.bool) if mask is None else ~mask.bool()
    for name in ("image_token_id", "video_token_id"):
        token = getattr(model.config, name, None)
        if isinstance(token, int):
            drop = drop | (ids == token)
    order = (~drop).to(torch.int8).argsort(dim=1, stable=True)
    count = max(1, int((~drop).sum(1).max()))
    order = order[:, -count:]
    return ids.gather(1, order), (~drop).gather(1, order).long()
