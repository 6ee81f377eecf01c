"""Strengthen heads of a picture-language model while it generates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from eff_kernels import Handle
from eff_kernels.edit.attention import find_decoder, intercept_attention
from eff_kernels.edit.caches import returned_cache
from torch import Tensor

from eff_attention.head_reinforcement.config import VHRConfig
from eff_attention.head_reinforcement.keeper import VHRKeeper, given_heads
from eff_attention.head_reinforcement.references import References
from eff_attention.head_reinforcement.rule import VHRRule
from eff_attention.passes import decoder_layers, states_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "head_reinforcement"


class VHRHandle(Handle):
    """A handle that can measure prompts ahead."""

    def __init__(self, model: Any, keeper: VHRKeeper) -> None:
        super().__init__()
        self._model, self._keeper = model, keeper

    @torch.no_grad()
    def heads(self, inputs: Mapping[str, Any]) -> dict[int, Tensor]:
        """The heads that are chosen for prompts, by layer, bool [B, H].

        Args:
            inputs: What the processor gives for them.
        """
        out = self._model(**inputs, use_cache=True)
        return {layer: state.heads for layer, state in sorted(self._keeper.kept(returned_cache(out)).items())}

    @contextlib.contextmanager
    def generation(self, inputs: Mapping[str, Any]) -> Iterator[dict[int, Tensor]]:
        """Measure prompts ahead; what this thread reads inside of the block gets their heads.

        Only needed where prompts are read in pieces. It costs one more pass over them.
        """
        heads = self.heads(inputs)
        with given_heads(self._keeper, find_decoder(self._model), heads):
            yield heads


def apply_vhr(
    model: PreTrainedModel, config: VHRConfig | None = None, *, order: float | None = None, remember: int = 0
) -> VHRHandle:
    """Strengthen, for each prompt, the heads whose output changes most when its pictures are taken away.

    When a prompt is read with an empty cache, it is read without its pictures first. Then each treated layer compares
    the outputs of its heads at the last token (`vision_aware_divergence`), chooses (`reject_negative_heads`,
    `select_heads`) and multiplies those of all tokens by ``alpha``, before the next layer runs. The choice is kept with
    the cache and holds for all later tokens. Weights of attention are not needed: any kernel of the host serves.

    Args:
        model: A picture-language model whose tokens `eff_kernels.edit.attention` knows, such as LLaVA or Qwen2-VL.
        config: Settings.
        order: Place among other rules on the same attention, see `intercept_attention`.
        remember: Texts whose pass without pictures is kept, the last ones: a question that is asked about many pictures
            is read without them once. Changed weights are noticed; take another handle where adapters are switched or
            other rules are put in. "lockstep" always needs the pass.

    Returns:
        A handle; ``remove()`` gives the model back. Copies and pickles of the model are treated too.

    Raises:
        ValueError: ``remember`` is negative, a layer does not exist, or another rule on the same attention has no other
            ``order``.
        NotImplementedError: the model is no decoder whose layers can all be reached.

    Warns:
        UserWarning: when prompts without any picture are read; they are left as they are.
    """
    config = config or VHRConfig()
    keeper: VHRKeeper = VHRKeeper.named(METHOD, order, config=config, references=References(remember))
    names = [name for name, _ in decoder_layers(model)]
    taken = [names[i] for i in config.chosen(len(names))]
    handle = VHRHandle(model, keeper)
    inner = intercept_attention(model, VHRRule(keeper), where=taken, needs=["roles"], order=order)
    handle.report = inner.report
    handle.on_remove(inner.remove)
    keeper.attach(find_decoder(model), handle)
    return handle


def vhr_generate(
    model: Any, inputs: Mapping[str, Any], config: VHRConfig | None = None, **options: Any
) -> Tensor | Any:
    """``model.generate(**inputs, **options)`` with heads measured ahead and strengthened, whatever the prefill.

    The model is as before afterwards.
    """
    with apply_vhr(model, config) as handle, handle.generation(inputs):
        return model.generate(**inputs, **options)


def chosen_heads(cache: Any, order: float | None = None) -> dict[int, Tensor]:
    """The heads that were chosen for the prompts in a cache, by layer, bool [B, H]."""
    return {layer: state.heads for layer, state in states_in(cache, METHOD, order).items()}
