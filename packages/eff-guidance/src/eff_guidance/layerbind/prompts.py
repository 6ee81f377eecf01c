"""The encoded prompts of a layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from eff_guidance.layerbind.layout import Layout


class Prompt(NamedTuple):
    """One encoded prompt.

    Attributes:
        tokens: [T, D]; prompts of one layout may differ in T.
        pooled: [P].
    """

    tokens: Tensor
    pooled: Tensor


class LayoutPrompts(NamedTuple):
    """The encoded prompts of a layout, in its order.

    Attributes:
        background: The background's.
        layers: The layers', front to back.
        negatives: What they are not; None for the negative prompt of the call. Empty for None everywhere.
    """

    background: Prompt
    layers: Sequence[Prompt]
    negatives: Sequence[Prompt | None] = ()


def encode_layout(pipe: Any, layout: Layout, **options: Any) -> LayoutPrompts:
    """Encode a layout's prompts with a pipeline's own text encoders.

    Args:
        pipe: A pipeline of SD3 or FLUX.
        layout: The layout.
        options: Further arguments of the pipeline's ``encode_prompt``, such as ``max_sequence_length``.

    Raises:
        ValueError: the pipeline has no text encoder.
    """
    if not any(getattr(pipe, name, None) is not None for name in ("text_encoder", "text_encoder_2", "text_encoder_3")):
        raise ValueError(
            f"this {type(pipe).__name__} has no text encoder; pass prompts=LayoutPrompts(...) with encoded prompts"
        )
    flux = "Flux" in type(pipe.transformer).__name__
    more = {} if flux else {"prompt_3": None, "do_classifier_free_guidance": False}
    found = pipe.encode_prompt(prompt=texts_of(layout), prompt_2=None, **more, **options)
    return gather_prompts(layout, found[0], found[1 if flux else 2])


def texts_of(layout: Layout) -> list[str]:
    """All prompts of a layout in the order that `gather_prompts` takes: background, layers, their negatives."""
    negatives = [layer.negative for layer in layout.layers if layer.negative is not None]
    return [layout.background, *(layer.prompt for layer in layout.layers), *negatives]


def gather_prompts(layout: Layout, tokens: Tensor, pooled: Tensor) -> LayoutPrompts:
    """A layout's prompts from the encoded texts [N, T, D] and [N, P] of `texts_of`."""
    made = [Prompt(*each) for each in zip(tokens.detach(), pooled.detach(), strict=True)]
    count = len(layout.layers)
    rest = iter(made[1 + count :])
    negatives = [None if layer.negative is None else next(rest) for layer in layout.layers]
    return LayoutPrompts(made[0], made[1 : 1 + count], negatives)


def check_prompts(prompts: LayoutPrompts, layout: Layout) -> LayoutPrompts:
    """The prompts with one negative a layer.

    Raises:
        ValueError: there are not as many as layers, or one is of another shape.
    """
    count = len(layout.layers)
    if len(prompts.layers) != count or len(prompts.negatives) not in (0, count):
        raise ValueError(f"{len(prompts.layers)} prompts and {len(prompts.negatives)} negative ones for {count} layers")
    negatives = list(prompts.negatives) or [None] * count
    for prompt in (prompts.background, *prompts.layers, *negatives):
        if prompt is not None and (prompt.tokens.dim() != 2 or prompt.pooled.dim() != 1):
            raise ValueError(
                f"an encoded prompt has tokens {list(prompt.tokens.shape)} and pooled {list(prompt.pooled.shape)}; "
                "use [T, D] and [P]"
            )
    return LayoutPrompts(prompts.background, list(prompts.layers), negatives)
