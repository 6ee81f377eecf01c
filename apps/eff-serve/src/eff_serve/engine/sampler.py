"""Choosing tokens from logits: penalties, masks, seeds. A request gets the same whatever the batch holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eff_serve.engine.truncation import draw
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
    def plain(self) -> bool:
        """Whether the logits are taken as they are."""
        s = self.sampling
        free = s.repetition_penalty == 1 and s.presence_penalty == 0 and s.frequency_penalty == 0
        return free and not s.logit_bias and s.min_tokens == 0 and s.grammar is None

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn, rather than the most likely one taken."""
        return self.sampling.temperature >= TINY

    def check(self, logits: Tensor) -> None:
        """Refuse logits, float32 [vocab], that allow no token: here one request ends, in `sample_batch` all fail.

        Raises:
            ValueError: there is a NaN or an infinite logit, or none above minus infinity.
        """
        if self.draws and not logits.max().isfinite():
            raise ValueError("the model gave logits that are not finite")

    def prepare(
        self, logits: Tensor, prompt: Sequence[int], output: Sequence[int], allowed: Tensor | None = None
    ) -> Tensor:
        """Logits as this request wants them, with what it forbids at minus infinity.

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
        return logits

    def sample(
        self, logits: Tensor, prompt: Sequence[int], output: Sequence[int], allowed: Tensor | None = None
    ) -> int:
        """Pick a token; the arguments are those of `prepare`."""
        return sample_batch([self], self.prepare(logits, prompt, output, allowed)[None])[0]

    def chance(self) -> float:
        """The next number from 0 to 1 of this request."""
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))


def sample_batch(samplers: Sequence[Sampler], logits: Tensor) -> list[int]:
    """A token for each of several requests, each with its own settings and its own randomness.

    Args:
        samplers: Of the requests.
        logits: float32 [B, vocab], prepared.
    """
    drawing = [i for i, sampler in enumerate(samplers) if sampler.draws]
    tokens = [0] * len(samplers)
    if len(drawing) < len(samplers):
        tokens = logits.argmax(1).tolist()
    if drawing:
        rows = logits if len(drawing) == len(samplers) else logits[drawing]
        settings, chances = [samplers[i].sampling for i in drawing], [samplers[i].chance() for i in drawing]
        for i, token in zip(drawing, draw(rows, settings, chances), strict=True):
            tokens[i] = token
    return tokens


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


def score(logits: Tensor, token: int, top: int) -> TokenScore:
    """Log-probability of a token under the model itself (raw logits [vocab]), and of the ``top`` most likely ones."""
    logprobs = torch.log_softmax(logits, -1)
    best = logprobs.topk(min(top, logprobs.numel())) if top else None
    pairs = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenScore(token, float(logprobs[token]), pairs)
