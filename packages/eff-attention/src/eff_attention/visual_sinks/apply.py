"""Redistribute the attention of a picture-language model while it runs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from eff_kernels import Handle
from eff_kernels.edit.attention import find_decoder, intercept_attention
from torch import Tensor

from eff_attention.passes import Keeper, decoder_layers, states_in, text_config
from eff_attention.visual_sinks.config import VARConfig, check_dims
from eff_attention.visual_sinks.dims import find_sink_dims, known_sink_dims
from eff_attention.visual_sinks.rule import SinkWatch, VARRule
from eff_attention.visual_sinks.statistics import LayerSinks, VARCounts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "visual_sinks"


class VARHandle(Handle):
    """A handle that tells what was found.

    Attributes:
        config: The settings, with the dimensions of sinks and tau as numbers.
    """

    def __init__(self, config: VARConfig, counts: VARCounts) -> None:
        super().__init__()
        self.config, self._counts = config, counts

    def stats(self) -> list[LayerSinks]:
        """Sinks, chosen heads and moved weight of each layer since the handle was made, over all passes."""
        return self._counts.layers()


def apply_var(model: PreTrainedModel, config: VARConfig | None = None, *, order: float | None = None) -> VARHandle:
    """Have heads that look at a picture spend on its content what they spend on sinks.

    Sinks are found among the tokens of each prompt, by what enters each layer (`sink_mask`), and kept with the cache.
    In heads that look at the picture (`image_centric_heads`) a share of their weight goes to the other tokens of the
    picture (`redistribute_attention`). Prompts may come in pieces. A row without a picture, and a layer without a sink
    in a picture, get the host's own attention.

    Args:
        model: A picture-language model whose tokens `eff_kernels.edit.attention` knows, such as LLaVA or Qwen2-VL.
        config: Settings.
        order: Place among other rules on the same attention, see `intercept_attention`.

    Returns:
        A handle; ``remove()`` gives the model back. Copies and pickles of the model are treated too.

    Raises:
        ValueError: dimensions of sinks do not exist or none was found, tau can never fire, no layer is left, or another
            rule on the same attention has no other ``order``.
        NotImplementedError: the model is no decoder whose layers can all be reached.
    """
    config = config or VARConfig()
    dims, tau = _resolved(model, config)
    config = dataclasses.replace(config, dims=dims, tau=tau)
    keeper: Keeper = Keeper.named(METHOD, order)
    blocks = decoder_layers(model)
    layers = config.layers(len(blocks))
    taken = [blocks[i][0] for i in layers]
    handle = VARHandle(config, counts := VARCounts())
    rule = VARRule(config, keeper, counts)
    inner = intercept_attention(model, rule, where=taken, needs=["roles"], order=order)
    handle.report = inner.report
    handle.on_remove(inner.remove)
    keeper.attach(find_decoder(model), handle)
    for i in layers:
        watch = SinkWatch(keeper, i, dims, tau)
        handle.on_remove(blocks[i][1].register_forward_pre_hook(watch, with_kwargs=True).remove)
    return handle


def visual_sinks_in(cache: Any, order: float | None = None) -> dict[int, Tensor]:
    """The sinks among the tokens of the prompt in a cache, those of the text included, by layer: bool [B, n]."""
    return {layer: state.sinks for layer, state in states_in(cache, METHOD, order).items()}


def _resolved(model: Any, config: VARConfig) -> tuple[tuple[int, ...], float]:
    """The dimensions of sinks and tau for a model."""
    size = text_config(model).hidden_size
    tau = config.threshold(size)
    dims = config.dims
    if dims == "auto":
        found = known_sink_dims(model)
        dims = tuple(find_sink_dims(model, tau=tau)) if found is None else found
        if not dims:
            raise ValueError(
                f"no hidden dimension of {type(model).__name__} is above tau={tau:.4g} at the first token of prompts; "
                "give dims=, or a lower tau ('auto')"
            )
    check_dims(dims, size)
    return dims, tau
