"""Raise the attention of a picture-language model to its pictures while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from eff_kernels import Handle
from eff_kernels.edit.attention import find_decoder, intercept_attention
from eff_kernels.edit.caches import returned_cache

from eff_attention.grounded_attention.config import PAIConfig, PAINTConfig
from eff_attention.grounded_attention.rule import PAINTKeeper, PAINTRule
from eff_attention.grounded_attention.state import InformedTokens
from eff_attention.grounded_attention.tower import Encoder, TowerWatch, find_tower
from eff_attention.passes import decoder_layers, states_in, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "grounded_attention"


class PAINTHandle(Handle):
    """A handle that shows which tokens are chosen."""

    def __init__(self, model: Any, order: float | None) -> None:
        super().__init__()
        self._model, self._order = model, order

    @torch.no_grad()
    def tokens(self, inputs: Mapping[str, Any]) -> InformedTokens:
        """The tokens that are raised for prompts, bool [B, T] each.

        Args:
            inputs: What the processor gives for them.
        """
        return informed_tokens_in(returned_cache(self._model(**inputs, use_cache=True)), self._order)


def apply_paint(model: PreTrainedModel, config: PAIConfig | None = None, *, order: float | None = None) -> PAINTHandle:
    """Raise, before the softmax, what the last query of each pass thinks of informed tokens of pictures.

    While pictures are encoded, two layers of the vision tower tell which of their tokens are local and which are
    summary (`select_informed_tokens`; where a token stands for several patches, its best counts). The choice is kept
    with the cache. Only the rows that are raised are computed beside the host's own attention.

    Args:
        model: A picture-language model whose tokens `eff_kernels.edit.attention` knows, such as LLaVA or InternVL.
        config: `PAINTConfig`, the default, or `PAIConfig` for all tokens of pictures.
        order: Place among other rules on the same attention, see `intercept_attention`.

    Returns:
        A handle; ``remove()`` gives the model back. Copies and pickles of the model are treated too.

    Raises:
        ValueError: a layer does not exist, factors do not fit layers and heads, the vision tower has no class token
            while ``saliency`` is "cls", or another rule on the same attention has no other ``order``.
        NotImplementedError: the model's decoder or vision tower cannot be reached.
    """
    config = config or PAINTConfig()
    names = [name for name, _ in decoder_layers(model)]
    settings, decoder = text_config(model), find_decoder(model)
    gains = config.gains(len(names), settings.num_attention_heads)
    keeper: PAINTKeeper = PAINTKeeper.named(METHOD, order, config=config)
    handle = PAINTHandle(model, order)
    taken = [names[i] for i in config.layers(len(names))]
    try:
        inner = intercept_attention(model, PAINTRule(keeper, gains), where=taken, needs=["roles"], order=order)
        handle.report = inner.report
        handle.on_remove(inner.remove)
        keeper.attach(decoder, handle)
        if isinstance(config, PAINTConfig):
            _watch_tower(model, decoder, config, order, handle)
    except Exception:
        handle.remove()
        raise
    return handle


def informed_tokens_in(cache: Any, order: float | None = None) -> InformedTokens:
    """The tokens that are raised in a cache, bool [B, n] each.

    Raises:
        ValueError: the cache is not of a treated model.
    """
    states = states_in(cache, METHOD, order)
    if not states:
        raise ValueError("nothing is known of the tokens in this cache")
    state = next(iter(states.values()))
    return InformedTokens(state.local, state.summary)


def _watch_tower(model: Any, decoder: Any, config: PAINTConfig, order: float | None, handle: Handle) -> None:
    tower = find_tower(model, decoder)
    depth = len(tower.names)
    places: dict[str, tuple[str, ...]] = {}
    for place, layer in (("first", config.local_layer), ("late", config.summary_layer)):
        if not -depth <= layer < depth:
            raise ValueError(f"layer {layer} of the vision tower does not exist; it has 0..{depth - 1}")
        name = tower.names[layer]
        places[name] = (*places.get(name, ()), place)
    if config.saliency == "cls" and not tower.prefix:
        raise ValueError(
            f"the vision tower of {type(model).__name__} has no class token; use saliency='received', which asks what "
            "patches attend to"
        )
    for name, some in places.items():
        watch = TowerWatch(some, tower.prefix, config.saliency, bool(config.spatial_ratio))
        handle.on_remove(intercept_attention(model, watch, where=name, order=order).remove)
    owner: Any = model.base_model
    stem = next(n for n, m in owner.named_modules() if m is model.get_submodule(tower.stem))
    if "get_image_features" in vars(owner):
        raise ValueError("get_image_features of this model has been replaced already; remove that first")
    owner.get_image_features = Encoder(owner, stem, config)
    handle.on_remove(lambda: vars(owner).pop("get_image_features", None))
