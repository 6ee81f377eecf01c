"""SoftPAG for modular pipelines. Imports diffusers."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, ClassVar

from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput, rescale_noise_cfg
from eff_kernels import Handle
from eff_kernels.edit.attention.forward import Forward
from torch import Tensor, nn

from eff_guidance.head_guidance.algebra import guide, guide_with_cfg, in_window
from eff_guidance.head_guidance.config import Path, SoftPAGConfig, Target
from eff_guidance.head_guidance.damage import Damage, install
from eff_guidance.together import ExtraPass, Rows, tell_extra, tell_rows

_ORDER = itertools.count(1000)


class SoftPAGGuidance(BaseGuidance):  # type: ignore[misc]
    """Guidance away from a prediction with damaged heads: ``u + g (c - u) + w (c - d)``.

    c is the prediction with the prompt, u without, d with the prompt and damaged heads; without CFG it is
    ``c + w (c - d)``. In a damaged head the attention map A becomes ``(1 - strength) A + strength P``. Fine-Grained
    Perturbation Guidance via Attention Head Selection (arXiv 2506.10978).

    Args:
        heads: Pairs (layer, head), or "all"; see `list_heads` and `HeadHunter`.
        scale: w. Typical 1 to 5, up to 8 for FLUX without CFG; 0 is off. diffusers' own PAG guider without CFG calls
            ``w + 1`` its scale.
        strength: u of the damage, 0 to 1. Typical 0.25 to 0.5 with many heads, 1 with few.
        target: P, see `soft_perturb_attention`.
        path: How A is moved to P.
        perturbation_start: Fraction of the steps where w sets in; step k of T has it if
            ``int(start T) <= k < int(stop T)``, the first step of the window included.
        perturbation_stop: Fraction where it ends.
        guidance_scale: g. Typical 3 to 7; 1 (0 in the original formulation) is off.
        guidance_rescale: Share of the guided prediction that is brought back to the deviation of c, 0 to 1.
        use_original_formulation: CFG as ``c + g (c - u)``.
        start: Fraction of the steps where CFG sets in.
        stop: Fraction where it ends.
        enabled: Whether it guides at all.
    """

    tells_extra_passes: ClassVar = True  # layers of a layout follow it
    _input_predictions: ClassVar[list[str]] = ["pred_cond", "pred_uncond", "pred_cond_perturbed"]

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        heads: Any = "all",
        scale: float = 3.0,
        strength: Any = 1.0,
        target: Target = "identity",
        path: Path = "linear",
        perturbation_start: float = 0.0,
        perturbation_stop: float = 1.0,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        strength = tuple(strength) if isinstance(strength, list) else strength
        self.settings = SoftPAGConfig(
            heads=heads, scale=scale, strength=strength, target=target, path=path, start=perturbation_start,
            stop=perturbation_stop,
        )  # fmt: skip
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale
        self.use_original_formulation = use_original_formulation
        self._held: tuple[weakref.ref[nn.Module], Damage, weakref.finalize[Any, Any]] | None = None

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Begin a step."""
        super().set_state(step, num_inference_steps, timestep)
        self._disarm()

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Before each pass; the last one of a step is the damaged one."""
        super().prepare_models(denoiser)
        if self._perturbs() and self._count_prepared == self.num_conditions:
            self._damage_of(denoiser).now.armed = True

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """After each pass."""
        self._disarm()

    def release(self) -> None:
        """Take the rule out of the denoiser; it goes back in at the next step. Also happens when the guider dies."""
        if self._held is not None:
            self._held[2]()
            self._held = None

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """The batches of a step: with prompt, without, and with prompt again for the damage."""
        return [self._prepare_batch(data, at, name) for at, name in self._passes()]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """As `prepare_inputs`, from fields of a block state."""
        return [self._prepare_batch_from_block_state(input_fields, data, at, name) for at, name in self._passes()]

    def forward(
        self, pred_cond: Tensor, pred_uncond: Tensor | None = None, pred_cond_perturbed: Tensor | None = None
    ) -> GuiderOutput:
        """Guided prediction; ``pred_uncond`` and ``pred_cond_perturbed`` are None in steps without them."""
        damaged = pred_cond if pred_cond_perturbed is None else pred_cond_perturbed
        scale = 0.0 if pred_cond_perturbed is None else self.settings.scale
        if pred_uncond is None:
            pred = guide(pred_cond, damaged, scale=scale)
        else:
            factor = self.guidance_scale + (1 if self.use_original_formulation else 0)
            pred = guide_with_cfg(pred_cond, pred_uncond, damaged, guidance_scale=factor, scale=scale)
        if self.guidance_rescale > 0.0:
            pred = rescale_noise_cfg(pred, pred_cond, self.guidance_rescale)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        """Whether the pass that was prepared last has the prompt."""
        return self._passes()[max(0, self._count_prepared - 1)][0] == 0

    @property
    def num_conditions(self) -> int:
        """Passes of this step."""
        return 1 + self._cfg() + self._perturbs()

    def _passes(self) -> list[tuple[int, str]]:
        passes = [(0, "pred_cond")]
        passes += [(1, "pred_uncond")] if self._cfg() else []
        return passes + ([(0, "pred_cond_perturbed")] if self._perturbs() else [])

    def _cfg(self) -> bool:
        off = 0.0 if self.use_original_formulation else 1.0
        return self._enabled and self.guidance_scale != off and self._within(self._start, self._stop)

    def _perturbs(self) -> bool:
        s = self.settings
        return self._enabled and s.scale != 0 and bool(s.heads) and s.strength != 0 and self._within(s.start, s.stop)

    def _within(self, start: float, stop: float) -> bool:
        steps = self._num_inference_steps
        return steps is None or in_window(self._step, steps, start, stop)

    def _disarm(self) -> None:
        if self._held is not None:
            self._held[1].now.armed = False

    def _damage_of(self, denoiser: nn.Module) -> Damage:
        if self._held is not None and self._held[0]() is denoiser and self._held[2].alive:
            return self._held[1]
        self.release()
        damage, handle = install(denoiser, self.settings, always=False, order=next(_ORDER))
        forward: Any = ArmedForward(denoiser, damage, self.settings.scale)
        denoiser.forward = forward
        handle.on_remove(lambda: ArmedForward.restore(denoiser))
        self._held = (weakref.ref(denoiser), damage, _at_end(self, handle))
        return damage

    def __deepcopy__(self, memo: dict[int, Any]) -> SoftPAGGuidance:
        copy: SoftPAGGuidance = self.new()
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}


class ArmedForward(Forward):
    """A denoiser's forward whose next pass in this thread is damaged if the guider asked for it, also if it raises."""

    def __init__(self, module: nn.Module, damage: Damage, scale: float) -> None:
        super().__init__(module)
        self.damage: Damage | None = damage
        self.scale = scale

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the denoiser."""
        if self.damage is None or not self.damage.now.armed:
            return self.plain(*args, **kwargs)
        self.damage.now.armed = False
        with self.damage.active(), tell_rows(Rows(0)), tell_extra(ExtraPass(self.scale)):
            return self.plain(*args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.damage, self.scale = None, 0.0  # a copy belongs to no guider


def _at_end(owner: object, handle: Handle) -> weakref.finalize[Any, Any]:
    found = weakref.finalize(owner, handle.remove)
    found.atexit = False
    return found
