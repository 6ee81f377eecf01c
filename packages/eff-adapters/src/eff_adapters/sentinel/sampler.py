"""The next sentence of a vision-language model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eff_adapters.sentinel.build import Sentence
from eff_adapters.sentinel.text import split_sentences

_MARK = "SENTENCEHERE"


def answer_prefix(processor: Any, question: str) -> str:
    """A chat about one picture, up to where the assistant's answer begins, by the processor's template.

    Raises:
        ValueError: the processor has no template, or one without a place for the assistant's words.
    """
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"{type(processor).__name__} has no chat template; pass prompt=, a function of the question")
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": _MARK}]},
    ]
    before, mark, _ = processor.apply_chat_template(chat).partition(_MARK)
    if not mark:
        raise ValueError("the chat template does not hold what the assistant says; pass prompt=")
    return str(before)


def joined(prefix: str, context: str, sentence: str = "") -> str:
    """Prompt, context and sentence as one text; without a sentence it ends where the next one's space would be."""
    if not sentence:
        return (prefix + context).rstrip(" ")
    return prefix + (f"{context} {sentence}" if context else sentence)


def encoded(processor: Any, images: list[Any], texts: list[str], **options: Any) -> Any:
    """Inputs of the model; a text that begins with the first special token gets no second one."""
    first = getattr(processor.tokenizer, "bos_token", None)
    special = not (first and texts[0].startswith(first))
    return processor(images=images, text=texts, return_tensors="pt", add_special_tokens=special, **options)


class SentenceSampler:
    """Samples the sentence that a model says next about a picture, behind a context.

    One token more than a sentence is drawn: only then is it known whether the model goes on or ends its answer.

    Args:
        model: A vision-language model of transformers, in evaluation mode.
        processor: Its processor.
        max_new_tokens: Most tokens of a sentence.
        temperature, top_p: Of sampling.
        prompt: ``prompt(question)`` is the text up to the answer; None takes the processor's chat template.
        options: Passed to ``generate``.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 0.9,
        prompt: Callable[[str], str] | None = None,
        **options: Any,
    ) -> None:
        self.model, self.processor, self.prompt = model, processor, prompt
        self.options = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": 0, **options
        }  # fmt: skip

    @torch.no_grad()
    def __call__(self, image: Any, question: str, context: str, *, n: int, seed: int) -> Sequence[Sentence]:
        """``n`` sentences; the global random state is as before afterwards."""
        from transformers import StoppingCriteriaList

        prefix = answer_prefix(self.processor, question) if self.prompt is None else self.prompt(question)
        device = next(self.model.parameters()).device
        inputs = encoded(self.processor, [image], [joined(prefix, context)]).to(device)
        inputs = inputs.to(next(self.model.parameters()).dtype)  # floats alone
        length = inputs["input_ids"].shape[1]
        tokenizer = self.processor.tokenizer

        def full(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            texts = tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)
            return torch.tensor([len(split_sentences(t)) > 1 for t in texts], device=ids.device)

        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            out = self.model.generate(
                **inputs, do_sample=True, num_return_sequences=n, stopping_criteria=StoppingCriteriaList([full]),
                **self.options,
            )  # fmt: skip
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        return [self._sentence(row.tolist(), ends) for row in out[:, length:]]

    def _sentence(self, tokens: list[int], ends: set[int]) -> Sentence:
        stop = next((i for i, token in enumerate(tokens) if token in ends), None)
        text = self.processor.tokenizer.decode(tokens[:stop], skip_special_tokens=True)
        sentences = split_sentences(text)
        return Sentence(sentences[0] if sentences else "", stop is not None and len(sentences) <= 1)
