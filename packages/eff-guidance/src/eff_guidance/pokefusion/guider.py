"""Two-scale guidance as a guider of diffusers. Imports diffusers."""

from __future__ import annotations

import contextlib
from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

from eff_guidance.pokefusion.scales import two_scale_guidance


class TwoScaleGuidance(BaseGuidance):  # type: ignore[misc]
    """Passes without conditions, with text, and with text and style.

    Args:
        text_scale: w_text.
        style_scale: w_style.
        start: Share of the steps after which guidance begins; outside there is one pass, with text and style.
        stop: Share after which it ends.
        enabled: Whether to guide.
    """

    _input_predictions = ["pred_full", "pred_uncond", "pred_text"]  # noqa: RUF012 - as diffusers declares it
    _inputs = (0, 1, 0)  # which of the (conditional, unconditional) inputs each takes

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        text_scale: float = 7.5,
        style_scale: float = 7.5,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        self.text_scale, self.style_scale = text_scale, style_scale
        self._handle: Any = None
        self._options: dict[str, Any] = {}
        self._open = contextlib.ExitStack()

    def bind(self, handle: Any, options: dict[str, Any]) -> None:
        """Say which adapter it is for, and how style is used."""
        self._handle, self._options = handle, options

    def prepare_models(self, denoiser: Any) -> None:
        """Let style act in the first pass of a step alone."""
        if self._handle is None:
            raise RuntimeError("this guider has no style adapter; make it by style_guider(handle), or call bind")
        passed = self._count_prepared % self.num_conditions
        self._count_prepared += 1
        if passed == 0:
            self._open.enter_context(self._handle.use(**{"unconditional": 0, **self._options}))

    def cleanup_models(self, denoiser: Any) -> None:
        """End the use of a pass."""
        self._open.close()

    def prepare_inputs(self, data: Any) -> list[Any]:
        """One batch of inputs a pass."""
        return [self._prepare_batch(data, i, name) for i, name in self._passes()]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        """One batch of inputs a pass."""
        return [self._prepare_batch_from_block_state(input_fields, data, i, name) for i, name in self._passes()]

    def _passes(self) -> list[tuple[int, str]]:
        return list(zip(self._inputs, self._input_predictions, strict=True))[: self.num_conditions]

    def forward(self, pred_full: Tensor, pred_uncond: Tensor | None = None, pred_text: Tensor | None = None) -> Any:
        """Combine the predictions."""
        made = pred_full
        if pred_uncond is not None and pred_text is not None:
            made = two_scale_guidance(pred_uncond, pred_text, pred_full, self.text_scale, self.style_scale)
        return GuiderOutput(pred=made, pred_cond=pred_full, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        """Whether the pass that was prepared last has the prompt."""
        return self._inputs[(self._count_prepared - 1) % self.num_conditions] == 0

    @property
    def num_conditions(self) -> int:
        """Passes of a step."""
        steps, inside = self._num_inference_steps, True
        if steps is not None:
            inside = int(self._start * steps) <= self._step < int(self._stop * steps)
        return 3 if self._enabled and inside else 1
