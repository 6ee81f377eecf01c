"""Putting the brush into a transformer."""

from __future__ import annotations

import functools
from typing import Any

from eff_kernels import Handle
from eff_kernels.edit import Report
from eff_kernels.edit.attention import find_attention, intercept_attention

from eff_guidance.context_brush.config import ContextBrushConfig
from eff_guidance.context_brush.rule import BrushRule
from eff_guidance.context_brush.spans import CanvasSpans
from eff_guidance.denoiser import denoiser_of, watch_denoiser

_MARK = "_eff_context_brush"


class BrushHandle(Handle):
    """Undoes the brush; `enable` and `disable` switch it on the model without removing it."""

    def __init__(self, rule: BrushRule, report: Report) -> None:
        super().__init__(report)
        self.rule = rule

    def enable(self) -> None:
        """Let the brush act, as it does from the start."""
        self.rule.enabled = True

    def disable(self) -> None:
        """Leave the model as it is without the brush, bit for bit."""
        self.rule.enabled = False


def apply_incontext_brush(
    pipe_or_model: Any, spans: CanvasSpans, config: ContextBrushConfig | None = None, *, order: float | None = None
) -> BrushHandle:
    """Change the joint attention of a transformer of FLUX's or SD3's class for one canvas.

    Args:
        pipe_or_model: The transformer, or a pipeline with one; a window of steps needs the pipeline.
        spans: Of the canvas.
        config: Strengths; the defaults are the paper's.
        order: Place among other rules on the same attention, see `intercept_attention`.

    Returns:
        A handle. Its report names attention that reads picture tokens alone (SD3.5's second one) as skipped.

    Raises:
        TypeError: there is no transformer.
        ValueError: the model has no joint attention, has the brush already, or a window is asked for without pipeline.
    """
    config = ContextBrushConfig() if config is None else config
    model = denoiser_of(pipe_or_model)
    if getattr(model, _MARK, False):
        raise ValueError("this transformer has a brush already; remove that handle first")
    windowed = config.start < config.stop and (config.start, config.stop) != (0.0, 1.0)
    scheduler = getattr(pipe_or_model, "scheduler", None)
    if windowed and scheduler is None:
        raise ValueError(f"start={config.start}, stop={config.stop} need the pipeline, whose scheduler counts steps")
    rule = BrushRule(spans, config)
    joint = [f.name for f in find_attention(model) if _is_joint(f.name, f.module)]
    if not joint:
        raise ValueError(f"{type(model).__name__} has no joint attention of text and picture tokens")
    handle = BrushHandle(rule, Report("apply_incontext_brush"))
    if not config.acts:
        return handle
    inner = intercept_attention(model, rule, where=joint, order=order, strict=True)
    handle.on_remove(inner.remove)
    for found in find_attention(model):
        if found.name in joint:
            handle.report.change(found.name)
        else:
            handle.report.skip(found.name, "it reads picture tokens alone, no text")
    setattr(model, _MARK, True)
    handle.on_remove(functools.partial(delattr, model, _MARK))
    if windowed:
        watch_denoiser(model, handle, scheduler)
    return handle


def _is_joint(name: str, module: Any) -> bool:
    """Double blocks have projections of a second stream; FLUX's single blocks get both joined."""
    joined = getattr(module, "added_kv_proj_dim", None) is not None
    return joined or "single_transformer_blocks." in f"{name}."
