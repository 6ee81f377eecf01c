"""Pictures of a profile and a policy, on axes of matplotlib that the caller makes."""

from __future__ import annotations

from typing import Any

import numpy as np

from eff_attention.layer_reuse.policy import LayerReusePolicy
from eff_attention.layer_reuse.profile import ReuseProfile


def plot_policy(axes: Any, profile: ReuseProfile, policy: LayerReusePolicy | None = None) -> Any:
    """Mean overlap of layer i (rows) and layer j (columns); a line joins each layer that reuses with its source.

    Returns:
        The image, for a colour bar.
    """
    overlap = profile.overlap.mean(0)
    shown = np.where(np.triu(np.ones_like(overlap), 1) > 0, overlap, np.nan)
    image = axes.imshow(shown, vmin=0, vmax=1, cmap="viridis")
    axes.set(xlabel="layer that would reuse", ylabel="layer whose blocks it would take")
    if policy is not None:
        for layer, (kind, source) in enumerate(zip(policy.kind, policy.source, strict=True)):
            if kind == "reuse":
                axes.plot([layer, layer], [source, layer], color="tab:red", linewidth=1)
                axes.plot(layer, source, "o", color="tab:red", markersize=3)
            else:
                marker = "s" if kind == "full" else "D"
                axes.plot(layer, layer, marker, color="black", markersize=4)
    return image


def plot_sensitivity(axes: Any, profile: ReuseProfile) -> None:
    """For each layer the share of blocks with 90 % of the mass, and what keeping it to its chosen blocks costs."""
    layers = np.arange(len(profile.kl))
    axes.plot(layers, profile.ratio90.mean((0, 2)), "o-", markersize=3, label="blocks for 90 % of the mass (share)")
    axes.plot(layers, profile.rnmse, "s-", markersize=3, label="error of the layer when sparse (relative)")
    axes.set(xlabel="layer", ylim=(0, None))
    other = axes.twinx()
    other.plot(layers, profile.kl, "^-", markersize=3, color="tab:red", label="KL when sparse (nats, right)")
    other.set(ylim=(0, None))
    lines = [line for a in (axes, other) for line in a.get_lines()]
    axes.legend(lines, [line.get_label() for line in lines], fontsize="small")
