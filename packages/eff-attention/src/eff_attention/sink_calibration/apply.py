"""Calibrate the attention of a decoder while it runs."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from eff_kernels import Handle
from eff_kernels.edit.attention import decoder_attention, find_decoder, intercept_attention

from eff_attention.layers import attention_types
from eff_attention.sink_calibration.config import ACTConfig
from eff_attention.sink_calibration.identity import model_hash
from eff_attention.sink_calibration.rule import CalibrationRule, begin_pass, end_pass
from eff_attention.sink_calibration.state import ATTRIBUTE, SinkState
from eff_attention.sink_calibration.statistics import HeadSinks, SinkCounts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ACTHandle(Handle):
    """A handle that tells which sinks were met."""

    def __init__(self, counts: SinkCounts) -> None:
        super().__init__()
        self._counts = counts

    def stats(self) -> list[HeadSinks]:
        """Sinks of each treated head since the handle was made, over all passes of this model."""
        return self._counts.heads()


def apply_act(model: PreTrainedModel, config: ACTConfig | None = None, *, order: float | None = None) -> ACTHandle:
    """Scale down the later attention sinks of chosen heads, and give their weight to the other tokens.

    Sinks are found again for each sequence and head (`find_attention_sinks`) and the weights changed by
    `calibrate_attention`. Prompts may come in pieces; what is known of a sequence is kept with its cache. A layer in
    which there is nothing to change runs the host's own attention.

    Args:
        model: A decoder that follows transformers' AttentionInterface, such as Llama, Qwen2, Mistral or Gemma.
        config: Settings; by default those of the paper for all heads of all layers but the first two and the last.
        order: Place among other rules on the same attention, see `intercept_attention`.

    Returns:
        A handle; ``remove()`` gives the model back, ``stats()`` tells what was found. Copies and pickles of the model
        are calibrated too.

    Raises:
        ValueError: a layer or head does not exist or has no full attention, no layer is left, or another rule on the
            same attention has no other ``order``.
        NotImplementedError: the model is no decoder built on AttentionInterface.

    Warns:
        UserWarning: the heads were chosen for another model.
    """
    config = config or ACTConfig()
    names = decoder_names(model)
    heads = treated_heads(model, config)
    if config.model_hash is not None and config.model_hash != (found := model_hash(model)):
        warnings.warn(
            f"the heads were chosen for model {config.model_hash}, this is {found}; head lists do not transfer",
            stacklevel=2,
        )
    counts = SinkCounts()
    handle = ACTHandle(counts)
    taken = {names[layer] for layer in heads}
    if not taken:  # heads={}: nothing to do, and nothing to take back
        return handle
    rule = CalibrationRule(config, heads, counts, "" if order is None else str(float(order)))
    inner = intercept_attention(model, rule, where=lambda name, module: name in taken, needs=["roles"], order=order)
    handle.report = inner.report
    handle.on_remove(inner.remove)
    decoder = find_decoder(model)  # not the model around it: other rules may call the decoder alone
    handle.on_remove(decoder.register_forward_pre_hook(begin_pass, with_kwargs=True).remove)
    handle.on_remove(decoder.register_forward_hook(end_pass, with_kwargs=True).remove)
    return handle


def sinks_in(cache: Any) -> dict[int, SinkState]:
    """What is known of the keys in a cache, by layer: sums of their weight, queries that saw them, and sinks."""
    states: dict[tuple[str, int], SinkState] = getattr(cache, ATTRIBUTE, {})
    return {layer: state for (_, layer), state in sorted(states.items())}


def decoder_names(model: Any) -> list[str]:
    """Names of the attention modules of a decoder, one a layer.

    Raises:
        NotImplementedError: the model is of another kind.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or getattr(model.config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"calibration needs a decoder on transformers' AttentionInterface, got {type(model).__name__}"
        )
    names = decoder_attention(model)
    count = model.config.get_text_config().num_hidden_layers
    if len(names) != count:
        raise NotImplementedError(
            f"calibration needs a decoder on transformers' AttentionInterface; of {type(model).__name__} the attention "
            f"of {len(names)} of {count} layers can be reached"
        )
    return names


def treated_heads(model: Any, config: ACTConfig) -> dict[int, tuple[int, ...]]:
    """Heads of a model that a config asks for, by layer; see `ACTConfig.chosen`."""
    settings = model.config.get_text_config()
    other = {i: kind for i, kind in enumerate(attention_types(settings)) if kind != "full_attention"}
    return config.chosen(settings.num_hidden_layers, settings.num_attention_heads, other)
