"""Decode with layers that reuse the choice of keys of an earlier layer, in any decoder of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eff_kernels import Handle
from eff_kernels.edit.attention import decoder_attention, intercept_attention

from eff_attention.layer_reuse.config import LayerReuseConfig
from eff_attention.layer_reuse.policy import LayerReusePolicy
from eff_attention.layer_reuse.rule import ReuseRule, begin_pass
from eff_attention.layers import attention_types

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_layer_reuse(
    model: PreTrainedModel,
    policy: LayerReusePolicy,
    config: LayerReuseConfig | None = None,
    *,
    order: float | None = None,
) -> Handle:
    """Let the reusing layers of a policy attend only to the blocks of keys that their anchors chose.

    Anchors choose as ``config.selector`` says, by default by the weights of their own dense attention; layers of kind
    "full" run dense (on the CPU by `decode_attention` too, which is faster there). Prompts run as before, but for phase
    "both"; so do steps of more than one token, and masks other than causal ones with padding.

    Where other rules change the same attention, blocks that were not chosen are hidden by a mask, so that those rules
    see the keys that are left; that costs what dense attention costs.

    Args:
        model: A decoder that follows transformers' AttentionInterface, such as Llama, Qwen2, Qwen3 or Mistral.
        policy: Kind and source of each layer.
        config: How many keys, and from which length on.
        order: Place among other rules on the same attention, see `intercept_attention`.

    Returns:
        A handle; ``remove()`` gives the model back. Copies and pickles of the model keep the policy.

    Raises:
        ValueError: the policy is for another number of layers, names layers without full attention, or another rule on
            the same attention has no other ``order``.
        NotImplementedError: the model is no decoder built on AttentionInterface.
    """
    names = _check(model, policy)
    rule = ReuseRule(policy, config or LayerReuseConfig())
    handle = intercept_attention(model, rule, where=lambda name, module: name in names, order=order)
    handle.on_remove(model.base_model.register_forward_pre_hook(begin_pass, with_kwargs=True).remove)
    return handle


def _check(model: Any, policy: LayerReusePolicy) -> set[str]:
    """Names of the attention modules of the decoder."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise NotImplementedError(f"layer reuse needs a model on transformers' AttentionInterface, got {type(model)}")
    settings = model.config
    if getattr(settings, "is_encoder_decoder", False):
        raise NotImplementedError(f"layer reuse is for decoders, {type(model).__name__} has an encoder")
    if len(policy.kind) != settings.num_hidden_layers:
        raise ValueError(f"the policy has {len(policy.kind)} layers, the model {settings.num_hidden_layers}")
    names = set(decoder_attention(model))
    if len(names) != len(policy.kind):
        raise NotImplementedError(
            f"layer reuse needs a model on transformers' AttentionInterface; of {type(model).__name__} "
            f"the attention of {len(names)} of {len(policy.kind)} layers can be reached"
        )
    types = attention_types(settings)
    taken = {i for i, source in enumerate(policy.source) if source >= 0} | set(policy.source) - {-1}
    wrong = {i: types[i] for i in sorted(taken) if types[i] != "full_attention"}
    if wrong:
        raise ValueError(f"layers that reuse or are reused must have full attention, got {wrong}")
    return names
