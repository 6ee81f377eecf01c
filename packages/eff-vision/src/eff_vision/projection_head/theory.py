"""The linear model of section 4: features with strengths phi, blurred by augmentations of strength sigma.

An input is ``sum_i phi_i s_i e_i`` with independent signs; a view adds noise of variance ``sigma_i^2`` along ``e_i``.
For a chain of linear layers under the spectral contrastive loss everything is known in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def optimal_linear_weights(
    phi: Tensor | Sequence[float], sigma: Tensor | Sequence[float] | float, *, layer: int, depth: int
) -> Tensor:
    """Weight of each feature after ``layer`` of ``depth`` linear layers trained from small balanced initial weights.

    After all layers it is ``phi / (phi^2 + sigma^2)``; after l of L its power l / L, so that earlier layers weigh
    features more evenly.

    Raises:
        ValueError: a strength is negative, or the layer is not one of the depth.
    """
    if not 1 <= layer <= depth:
        raise ValueError(f"layer must be from 1 to depth={depth}, got {layer}")
    strength = torch.as_tensor(phi, dtype=torch.float64)
    noise = torch.as_tensor(sigma, dtype=torch.float64).expand_as(strength)
    if bool((strength < 0).any()) or bool((noise < 0).any()):
        raise ValueError("phi and sigma must not be negative")
    whole = strength / (strength.square() + noise.square())
    return whole.nan_to_num(0.0) ** (layer / depth)


def population_loss(chain: Sequence[Tensor], phi: Tensor, sigma: Tensor) -> Tensor:
    """Spectral contrastive loss of a linear chain in expectation: ``-2 tr(P M P^T) + |P S P^T|_F^2``.

    Args:
        chain: Weights of the layers, first layer first.
        phi: Strengths [n].
        sigma: Strengths of the noise [n].
    """
    product = torch.linalg.multi_dot(list(reversed(chain))) if len(chain) > 1 else chain[0]
    between = (product * phi.square()) @ product.T
    within = (product * (phi.square() + sigma.square())) @ product.T
    return -2 * between.trace() + within.square().sum()


def population_minimum(phi: Tensor, sigma: Tensor) -> float:
    """The least value of `population_loss`: ``-sum (phi^2 / (phi^2 + sigma^2))^2``."""
    return -float((phi.square() / (phi.square() + sigma.square())).square().sum())


def feature_weights(chain: Sequence[Tensor]) -> list[Tensor]:
    """For each layer the norm [n] of what the chain up to it makes of each input feature."""
    norms, product = [], None
    for weight in chain:
        product = weight if product is None else weight @ product
        norms.append(product.norm(dim=0))
    return norms
