"""Training an encoder, and joining the predictions of several."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from eff_vision.brain_encoder.encoder import RoiQueryEncoder
from eff_vision.brain_encoder.metrics import pearson_columns

Responses = Mapping[str, Tensor]


@dataclass(slots=True)
class FitHistory:
    """Losses and validation correlations of each epoch, and the best epoch (from 0)."""

    loss: list[float] = field(default_factory=list)
    correlation: list[float] = field(default_factory=list)
    best: int = 0


def fit_encoder(
    encoder: RoiQueryEncoder,
    train: tuple[Tensor, Responses],
    validation: tuple[Tensor, Responses],
    grid: tuple[int, int],
    *,
    lr: float = 5e-4,
    weight_decay: float = 1e-4,
    epochs: int = 15,
    batch: int = 16,
    clip: float = 0.1,
    seed: int = 0,
) -> FitHistory:
    """Train with the sum of the mean squared errors of all sets; the weights of the best epoch stay.

    Args:
        encoder: Trained in place.
        train: Features [N, S, D] and responses of each set [N, V], z-scored with statistics of the training items.
        validation: The same of other items; the mean correlation over targets chooses the epoch.
        grid: Rows and columns of the patches.
        lr: Learning rate of AdamW.
        weight_decay: Its weight decay.
        epochs: Passes over the training items.
        batch: Items of a step.
        clip: Largest norm of the gradient.
        seed: Of the order of items.
    """
    features, responses = train
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=lr, weight_decay=weight_decay)
    history, best = FitHistory(), copy.deepcopy(encoder.state_dict())
    for epoch in range(epochs):
        encoder.train()
        total = 0.0
        for rows in torch.randperm(len(features), generator=generator).split(batch):
            prediction = encoder(features[rows], grid).prediction
            loss = torch.stack([F.mse_loss(prediction[k], y[rows]) for k, y in responses.items()]).sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(encoder.parameters(), clip)
            optimizer.step()
            total += loss.item() * len(rows)
        history.loss.append(total / len(features))
        history.correlation.append(mean_correlation(encoder, validation, grid))
        if history.correlation[-1] >= max(history.correlation):
            history.best, best = epoch, copy.deepcopy(encoder.state_dict())
    encoder.load_state_dict(best)
    encoder.eval()
    return history


@torch.no_grad()
def mean_correlation(encoder: RoiQueryEncoder, data: tuple[Tensor, Responses], grid: tuple[int, int]) -> float:
    """Mean Pearson correlation over the targets of all sets, constant ones left out."""
    encoder.eval()
    parts = [encoder(x, grid).prediction for x in data[0].split(64)]
    found = [pearson_columns(torch.cat([p[k] for p in parts]), y) for k, y in data[1].items()]
    return float(torch.cat(found).nanmean())


def layer_weights(correlations: Tensor, temperature: float = 40.0) -> Tensor:
    """Weights [M, V] of M models for each target: softmax over models of ``temperature`` times validation r [M, V].

    A model whose correlation is NaN gets weight 0 unless all are, which gives the mean.
    """
    if correlations.ndim != 2:
        raise ValueError(f"correlations must be [M, V], got {list(correlations.shape)}")
    scores = correlations.nan_to_num(-torch.inf) * temperature
    scores = torch.where(correlations.isnan().all(0), torch.zeros_like(scores), scores)
    return scores.softmax(0)


def ensemble_predict(
    predictions: Sequence[Tensor], correlations: Tensor | None = None, temperature: float = 40.0
) -> Tensor:
    """Join predictions [N, V] of M models: their mean, or weighted for each target by `layer_weights`."""
    stacked = torch.stack(list(predictions))
    if correlations is None:
        return stacked.mean(0)
    return torch.einsum("mnv,mv->nv", stacked, layer_weights(correlations, temperature).to(stacked))
