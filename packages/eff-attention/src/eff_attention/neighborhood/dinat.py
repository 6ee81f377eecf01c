"""DiNAT of transformers without natten: the functions that natten dropped, and the layer's order of axes put right."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from typing import Any

from eff_kernels import Handle
from torch import Tensor

from eff_attention.neighborhood.unfused import natten2dav, natten2dqkrpb

_MODEL = "transformers.models.dinat.modeling_dinat"


def enable_dinat() -> Handle:
    """Let the DiNAT models of transformers run and train on our operations, with any natten or none.

    transformers 5 imports ``natten2dqkrpb`` and ``natten2dav``, which natten has not had since 0.20, asks for natten
    when a model is built, and swaps the height and the width of the map where it means to move the heads. Call this
    before DiNAT is imported from transformers. Models that exist already run on our operations as well.

    Returns:
        A handle whose ``remove()`` puts back what transformers had.
    """
    handle = Handle()
    if _MODEL not in sys.modules and importlib.util.find_spec("natten") is not None:
        natten = importlib.import_module("natten.functional")
        for function in (natten2dqkrpb, natten2dav):  # for the import of the model alone
            if not hasattr(natten, function.__name__):
                setattr(natten, function.__name__, function)
                handle.on_remove(functools.partial(delattr, natten, function.__name__))
    model = importlib.import_module(_MODEL)
    layer = model.NeighborhoodAttention
    for owner, name, new in (
        (model, "natten2dqkrpb", natten2dqkrpb),
        (model, "natten2dav", natten2dav),
        (model, "requires_backends", _require_others),
        (layer, "forward", _forward),
    ):
        handle.on_remove(functools.partial(setattr, owner, name, getattr(owner, name)))
        setattr(owner, name, new)
    return handle


def _require_others(model: Any, backends: list[str]) -> None:
    """Transformers' check, without natten."""
    from transformers.utils.import_utils import requires_backends

    requires_backends(model, [b for b in backends if b != "natten"])


def _forward(self: Any, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor, ...]:
    """As transformers' layer, with the heads moved to the front: [B, X, Y, C] to [B, H, X, Y, D]."""
    heads = (self.num_attention_heads, self.attention_head_size)
    q, k, v = (p(hidden_states).unflatten(-1, heads).movedim(-2, 1) for p in (self.query, self.key, self.value))
    scores = natten2dqkrpb(q * self.attention_head_size**-0.5, k, self.rpb, self.kernel_size, self.dilation)
    weights = self.dropout(scores.softmax(-1))
    context = natten2dav(weights, v, self.kernel_size, self.dilation).movedim(1, -2).flatten(-2)
    return (context, weights) if output_attentions else (context,)
