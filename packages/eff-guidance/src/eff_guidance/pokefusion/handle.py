"""Adding a style adapter to a model, using, training and saving it."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from eff_kernels import Handle
from eff_kernels.edit import Report, write_whole
from eff_kernels.edit.attention import intercept_attention
from torch import Tensor, nn

from eff_guidance.denoiser import denoiser_of
from eff_guidance.pokefusion.adapter import StyleAdapter, StyleLayer, StyleProjection
from eff_guidance.pokefusion.config import StyleAttentionConfig
from eff_guidance.pokefusion.layers import is_joint, matrix_of, projections, style_layers
from eff_guidance.pokefusion.rule import StyledAttention, StyledDenoiser, StyleRule, calls_once
from eff_guidance.pokefusion.train import training_loss
from eff_guidance.pokefusion.use import StyleUse, reset_use, set_use

WEIGHTS, SETTINGS = "style_adapter.safetensors", "style_config.json"
_MARK = "_eff_style_attention"
_log = logging.getLogger(__name__)


def add_style_attention(
    pipe_or_model: Any, config: StyleAttentionConfig | None = None, *, order: float | None = None
) -> StyleAttentionHandle:
    """Give a frozen model a second cross-attention to learnt style tokens.

    Style acts inside of ``with handle.use(...)`` only; outside, and with strength 0, the model is as before, bit for
    bit. All parameters of the denoiser are set to require no gradient.

    Args:
        pipe_or_model: A pipeline of diffusers, or its UNet (SD1.5, SDXL) or transformer (SD3, FLUX, PixArt, Sana).
        config: Form of the adapter.
        order: Place among other rules on the same attention, see `intercept_attention`.

    Returns:
        The handle, with the adapter in float32 on the model's device; ``remove()`` gives the model back.

    Raises:
        ValueError: no layer fits, layers read text of different widths, or the model has such an adapter already.
        TypeError: there is no denoiser.
    """
    config = StyleAttentionConfig() if config is None else config
    model = denoiser_of(pipe_or_model)
    if getattr(model, _MARK, False):
        raise ValueError("this model has a style adapter already; remove that handle first")
    modules: dict[str, Any] = style_layers(model, config.layers)
    for name, module in modules.items():
        if is_joint(module) and not calls_once(module):
            raise ValueError(f"{name}: {type(module.processor).__name__} is not a processor of the model; remove it")
    adapter = _adapter(model, modules, config)
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    handle = StyleAttentionHandle(adapter, model, None if pipe_or_model is model else pipe_or_model)
    try:
        for name, module in modules.items():
            inner = intercept_attention(model, StyleRule(adapter, name), where=[name], order=order)
            handle.on_remove(inner.remove)
            if not is_joint(module):
                module.forward = StyledAttention(module, adapter, name)
                handle.on_remove(functools.partial(StyledAttention.restore, module))
            handle.report.change(name)
    except Exception:
        handle.remove()
        raise
    model.forward = StyledDenoiser(model, adapter)
    handle.on_remove(functools.partial(StyledDenoiser.restore, model))
    setattr(model, _MARK, True)
    handle.on_remove(functools.partial(delattr, model, _MARK))
    for p, wanted in frozen:
        p.requires_grad_(False)
        handle.on_remove(functools.partial(p.requires_grad_, wanted))
    return handle


def _adapter(model: Any, modules: Mapping[str, Any], config: StyleAttentionConfig) -> StyleAdapter:
    layers: dict[str, StyleLayer] = {}
    first = ""
    for name, module in modules.items():
        key, value = (matrix_of(linear) for linear in projections(module))
        width = key.shape[1]
        if first and width != layers[first].to_k_style.in_features:
            raise ValueError(
                f"{name} reads text of width {width}, {first} of {layers[first].to_k_style.in_features}; one adapter "
                "serves layers of one width"
            )
        layers[name] = StyleLayer(key, value, config.gate_init)
        first = first or name
    width = layers[first].to_k_style.in_features
    text = getattr(model.config, "joint_attention_dim", None) or getattr(model.config, "cross_attention_dim", width)
    style = StyleProjection(
        config.num_styles, config.tokens_per_style, config.style_dim, width, text if config.text_modulated else None
    )
    return StyleAdapter(config, style.to(layers[first].gate.device), layers)


class StyleAttentionHandle(Handle):
    """A style adapter on a model.

    Attributes:
        adapter: The trained parts, an ``nn.Module``.
        model: The denoiser.
        pipe: The pipeline, if one was given.
        strength: Of uses that name none.
    """

    def __init__(self, adapter: StyleAdapter, model: nn.Module, pipe: Any) -> None:
        super().__init__(Report("add_style_attention"))
        self.adapter, self.model, self.pipe, self.strength = adapter, model, pipe, 1.0

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that is trained."""
        return self.adapter.parameters()

    def parameter_groups(self, *, weight_decay: float = 1e-2, gate_decay: float = 1e-4) -> list[dict[str, Any]]:
        """Groups for an optimizer: gates have a decay of their own."""
        gates = [p for n, p in self.adapter.named_parameters() if n.endswith(".gate")]
        others = [p for n, p in self.adapter.named_parameters() if not n.endswith(".gate")]
        return [{"params": others, "weight_decay": weight_decay}, {"params": gates, "weight_decay": gate_decay}]

    def set_strength(self, strength: float) -> None:
        """Set the strength of uses that name none."""
        self.strength = float(strength)

    @contextlib.contextmanager
    def use(
        self,
        style_ids: int | Sequence[int] | None = None,
        *,
        weights: Sequence[float] | Sequence[Sequence[float]] | Tensor | None = None,
        strength: float | None = None,
        layer_strength: Mapping[str, float] | None = None,
        steps: tuple[float, float] = (0.0, 1.0),
        mask: Tensor | None = None,
        guidance_ratio: float = 1.0,
        unconditional: int | None = None,
        keep: Tensor | None = None,
        cache: bool = True,
    ) -> Iterator[StyleUse]:
        """Let style act on calls of the model in this thread.

        Args:
            style_ids: A style, or one for each prompt; 0 by default.
            weights: Instead a mixture, [K] or [B, K]; rows that do not sum to 1 are scaled, with a warning.
            strength: Factor of the style's attention, negative ones included; that of `set_strength` by default.
            layer_strength: Further factors by name of layers, such as ``{"up_blocks.1": 0.5}``.
            steps: Share of the sampler's steps at which style begins and ends; needs the pipeline.
            mask: Where style acts, [H, W] from 0 to 1, in the picture's proportions.
            guidance_ratio: w_style / w_text of two-scale guidance, see `two_scale_guidance`; else than 1 it costs a
                second pass. The pipeline's own guidance scale is w_text.
            unconditional: Rows at the front of the batch without style; by default the first half if the pipeline
                guides (SD1.5, SDXL, SD3), else none. FLUX's negative prompt is a pass of its own, with style.
            keep: Which of the other rows get style, bool [B].
            cache: Whether keys and values of style are kept for the length of the use.

        Raises:
            ValueError: a style does not exist, weights are negative, both ids and weights are given, a layer is
                unknown, or steps without a pipeline.
        """
        use = StyleUse(
            weights=self._mixture(style_ids, weights), strength=self.strength if strength is None else float(strength),
            layer_strength=self._layer_strength(layer_strength), steps=self._steps(steps), mask=_mask(mask),
            ratio=float(guidance_ratio), unconditional=unconditional, keep=keep, pipe=self.pipe,
            kept={} if cache else None,
        )  # fmt: skip
        token = set_use(self.adapter.uid, use)
        try:
            yield use
        finally:
            reset_use(token)

    def _mixture(self, ids: Any, weights: Any) -> Tensor:
        count = self.adapter.config.num_styles
        if weights is not None:
            if ids is not None:
                raise ValueError("pass style_ids or weights, not both")
            found = torch.as_tensor(weights, dtype=torch.float32).reshape(-1, count)
            if not bool((found >= 0).all()) or not bool((found.sum(-1) > 0).all()):
                raise ValueError(f"weights={found.tolist()}; wanted none below 0 and some above in each row")
            total = found.sum(-1, keepdim=True)
            if not torch.allclose(total, torch.ones_like(total), atol=1e-5):
                _log.warning("weights of styles sum to %s; scaled to 1", total.flatten().tolist())
                found = found / total
            return found
        chosen = torch.as_tensor(0 if ids is None else ids).reshape(-1)
        if chosen.is_floating_point():
            raise TypeError(f"style_ids must be whole numbers, got {chosen.dtype}")
        if not bool(((chosen >= 0) & (chosen < count)).all()):
            raise ValueError(f"style_ids={chosen.tolist()}; this adapter has styles 0 to {count - 1}")
        return nn.functional.one_hot(chosen.cpu(), count).float()

    def _layer_strength(self, given: Mapping[str, float] | None) -> Mapping[str, float]:
        for pattern in given or {}:
            if not any(n == pattern or n.startswith(pattern + ".") for n in self.adapter.names):
                raise ValueError(
                    f"layer_strength names {pattern!r}; layers with style are {', '.join(self.adapter.names)}"
                )
        return dict(given or {})

    def _steps(self, steps: tuple[float, float]) -> tuple[float, float]:
        start, stop = (float(s) for s in steps)
        if not 0 <= start <= stop <= 1:
            raise ValueError(f"steps={steps}; wanted 0 <= start <= stop <= 1")
        if (start, stop) != (0.0, 1.0) and self.pipe is None:
            raise ValueError(f"steps={steps} need the pipeline, whose scheduler counts steps; add style to that")
        return start, stop

    def train_step(
        self, latents: Tensor, noise: Tensor, t: Tensor, encoder_hidden_states: Tensor, style_ids: Any = None, **kw: Any
    ) -> Tensor:
        """The loss of one batch, see `training_loss`; keyword arguments go there and on to the denoiser."""
        keep = kw.pop("keep", None)
        with self.use(style_ids, unconditional=0, keep=keep, cache=False, strength=1.0):
            return training_loss(self.model, self.pipe, latents, noise, t, encoder_hidden_states, **kw)

    def fit_token_norm(self, text: Tensor) -> None:
        """Scale style tokens to the mean norm of text tokens [..., T, d], as the layers with style get them."""
        self.adapter.style.token_scale.copy_(text.float().norm(dim=-1).mean() / self.adapter.style.width**0.5)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter's weights and settings into a folder."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.adapter.tensors().items()}
        about = {
            "base": type(self.model).__name__,
            "widths": {n: list(self.adapter.layer(n).to_k_style.weight.shape) for n in self.adapter.names},
            "config": self.adapter.config.to_dict(),
        }
        write_whole(folder / WEIGHTS, lambda path: save_file(tensors, path))
        text = json.dumps(about, indent=1) + "\n"
        write_whole(folder / SETTINGS, lambda path: Path(path).write_text(text, encoding="utf-8"))

    @classmethod
    def from_pretrained(
        cls, pipe_or_model: Any, folder: str | Path, *, order: float | None = None
    ) -> StyleAttentionHandle:
        """Add a saved adapter to a model of the class that it was trained on.

        Raises:
            ValueError: the model is of another class, or a layer of another width.
        """
        from safetensors.torch import load_file

        about = json.loads((Path(folder) / SETTINGS).read_text(encoding="utf-8"))
        model = denoiser_of(pipe_or_model)
        if about["base"] != type(model).__name__:
            raise ValueError(f"the adapter was trained on {about['base']}, this is {type(model).__name__}")
        config = StyleAttentionConfig.from_dict(about["config"])
        modules: dict[str, Any] = style_layers(model, config.layers)
        for name, wanted in about["widths"].items():
            linear = projections(modules[name])[0] if name in modules else None
            seen = None if linear is None else [linear.out_features, linear.in_features]
            if seen != wanted:
                raise ValueError(f"{name}: the adapter's keys are {wanted}, this model's {seen or 'missing'}")
        handle = add_style_attention(pipe_or_model, config, order=order)
        try:
            tensors = load_file(Path(folder) / WEIGHTS)
            handle.adapter.to(next(iter(tensors.values())).dtype)
            handle.adapter.load(tensors)
        except Exception:
            handle.remove()
            raise
        return handle


def _mask(mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ValueError(f"mask must be a tensor [H, W], got {list(getattr(mask, 'shape', ())) or type(mask).__name__}")
    return mask.float()
