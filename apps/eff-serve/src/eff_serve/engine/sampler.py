"""Choosing a token from logits: penalties, truncation, seeds; one request at a time, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eff_serve.engine.types import Sampling, TokenScore

TINY = torch.finfo(torch.float32).tiny  # smaller temperatures are zero in float32, and so greedy


class Sampler:
    """Draws the tokens of one request.

    Args:
        sampling: The request's settings.
        eos: Tokens that end a text.
        generator: Source of randomness, made here from the seed if there is one.
    """

    def __init__(self, sampling: Sampling, eos: frozenset[int]) -> None:
        self.sampling = sampling
        self._ends = sorted(sampling.stop_token_ids | eos)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % 2**63)

    @property
    def greedy_from_raw(self) -> bool:
        """Whether the choice is the largest raw logit, which a batch can compute at once."""
        s = self.sampling
        plain = s.repetition_penalty == 1 and s.presence_penalty == 0 and s.frequency_penalty == 0
        return s.temperature < TINY and plain and not s.logit_bias and s.min_tokens == 0 and s.grammar is None

    def choose(
        self, logits: Tensor, prompt: Sequence[int], output: Sequence[int], allowed: Tensor | None = None
    ) -> int:
        """Pick a token.

        Args:
            logits: float32 [vocab]; left unchanged.
            prompt: Its tokens, for the repetition penalty.
            output: Tokens so far, for the penalties.
            allowed: bool [vocab]; tokens that the grammar admits.
        """
        s = self.sampling
        logits = adjusted(logits, s, prompt, output)
        if allowed is not None:
            logits.masked_fill_(~allowed, -torch.inf)
        if len(output) < s.min_tokens:
            longer = logits.clone()
            longer[[t for t in self._ends if t < logits.numel()]] = -torch.inf
            if longer.max() > -torch.inf:  # a grammar that is at its end goes before min_tokens
                logits = longer
        if s.temperature < TINY:
            return int(logits.argmax())
        # Below the largest logit all differences are negative: dividing by a tiny temperature gives -inf, never NaN.
        probabilities = truncated((logits - logits.max()) / s.temperature, s)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def adjusted(logits: Tensor, s: Sampling, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """A copy of the logits with bias and penalties."""
    logits = logits.clone()
    if s.repetition_penalty != 1 and (prompt or output):
        seen = torch.tensor(sorted({*prompt, *output}))
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
    if (s.presence_penalty or s.frequency_penalty) and output:
        tokens, counts = torch.tensor(output).unique(return_counts=True)
        logits[tokens] -= s.presence_penalty + s.frequency_penalty * counts
    for token, bias in s.logit_bias.items():
        logits[token] += bias
    return logits


def truncated(logits: Tensor, s: Sampling) -> Tensor:
    """Probabilities [vocab] after top-k, top-p and min-p, not normalised; the most likely token always stays."""
    if 0 < s.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(s.top_k).values[-1], -torch.inf)
    probabilities = torch.softmax(logits, -1)
    if s.min_p > 0:
        probabilities = probabilities * (probabilities >= s.min_p * probabilities.max())
    if s.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        # Keep tokens until their sum reaches top_p, the one that reaches it included.
        beyond = ordered.cumsum(0) - ordered >= s.top_p * ordered.sum()
        beyond[0] = False
        probabilities = probabilities.index_fill(0, order[beyond], 0.0)
    return probabilities


def score(logits: Tensor, token: int, top: int) -> TokenScore:
    """Log-probability of a token under the model itself (raw logits [vocab]), and of the ``top`` most likely ones."""
    logprobs = torch.log_softmax(logits, -1)
    best = logprobs.topk(min(top, logprobs.numel())) if top else None
    pairs = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenScore(token, float(logprobs[token]), pairs)
