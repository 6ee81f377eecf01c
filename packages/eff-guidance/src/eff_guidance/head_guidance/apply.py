"""Damage heads of a model, with a handle."""

from __future__ import annotations

from eff_kernels import Handle
from torch import nn

from eff_guidance.head_guidance.config import SoftPAGConfig
from eff_guidance.head_guidance.damage import Damage, install


class PerturbationHandle(Handle):
    """Undoes `apply_head_perturbation`, and turns it down, off and on.

    Changes of strength take effect in all threads and do not compile a model again.

    Attributes:
        damage: The rule in the model.
    """

    def __init__(self, damage: Damage, inner: Handle) -> None:
        super().__init__(inner.report)
        self.damage = damage
        self.on_remove(inner.remove)

    def set_strength(self, strength: float | tuple[float, ...]) -> None:
        """Set u of all heads, or of each in the order of the config.

        Raises:
            ValueError: outside of 0..1, or another number of them than heads.
        """
        self.damage.set_strength(strength)

    def enable(self) -> None:
        """Damage again after `disable`."""
        self.damage.always = True

    def disable(self) -> None:
        """Leave the model as it was until `enable`; bit-identical."""
        self.damage.always = False


def apply_head_perturbation(
    model: nn.Module, config: SoftPAGConfig, *, order: float | None = None
) -> PerturbationHandle:
    """Damage heads of a denoiser in every pass, until the handle is removed; also a context manager.

    This is the damage without the guidance, to look at or to guide by in a loop of one's own. ``scale``, ``start`` and
    ``stop`` of the config belong to the guidance and are not looked at. Copies and pickles of the model keep the
    damage.

    Args:
        model: SD3Transformer2DModel, FluxTransformer2DModel or UNet2DConditionModel, also compiled, quantised, with
            LoRA, offloaded or cast by layer. Attention must run by PyTorch's scaled_dot_product_attention (diffusers'
            backend "native"); other backends raise RuntimeError when the model runs.
        config: Which heads, and how.
        order: Place among other rules on the same modules, see `eff_kernels.edit.attention.intercept_attention`.

    Raises:
        TypeError: another model.
        ValueError: a head does not exist.
    """
    damage, inner = install(model, config, always=True, order=order)
    return PerturbationHandle(damage, inner)


perturbed_heads = apply_head_perturbation
