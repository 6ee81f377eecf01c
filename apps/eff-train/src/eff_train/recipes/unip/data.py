"""Rooms as a thermal camera might see them, and photographs without their colours."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from eff_vision.unip import GreyTriplicate
from torch import Tensor

from eff_train.frame import HELD_OUT, generator

SIDE = 64
PHOTOGRAPHS = ("astronaut", "coffee", "cat", "rocket", "brick", "grass", "gravel", "coins", "camera", "moon")
IGNORE = 255


def thermal(seed: int) -> tuple[Tensor, Tensor]:
    """A room as a thermal camera might see it, [1, 64, 64], and its classes [64, 64].

    Each thing has a temperature that its kind suggests, the room is cool and uneven; blur and noise are the
    camera's, textures are gone.
    """
    from eff_embedded.scenes import CLASSES, SceneConfig, make_path, make_scene, render_views

    scene = make_scene(SceneConfig(num_objects=(4, 7)), seed=seed)
    view = render_views(scene, make_path(scene, 1, seed=seed, size=(SIDE, SIDE)), [0.0])
    classes, things, normals = view.classes[0], view.instances[0], view.camera_normals[0]
    draw = generator(seed, 5)
    usual = np.linspace(0.35, 0.95, len(CLASSES))
    warmth = torch.tensor(0.25 + 0.1 * draw.random(3), dtype=torch.float32)
    heat_ = warmth[classes.clamp(max=2)] + 0.06 * torch.linspace(-1, 1, SIDE)[:, None] * float(draw.normal())
    for k in things.unique().tolist():
        if k >= 0:
            kind = int(classes[things == k][0])
            heat_[things == k] = float(np.clip(usual[kind] + 0.07 * draw.normal(), 0.2, 1.0))
    picture = (heat_ * (0.9 + 0.1 * normals[2].abs()))[None, None]
    kernel = torch.exp(-(torch.arange(-2.0, 3) ** 2) / (2 * 0.8**2))
    kernel = kernel[:, None] * kernel
    picture = F.conv2d(F.pad(picture, (2, 2, 2, 2), mode="replicate"), (kernel / kernel.sum())[None, None])[0]
    noise = 0.02 * draw.standard_normal((SIDE, SIDE)) + 0.01 * draw.standard_normal(SIDE)
    picture = (picture + torch.from_numpy(noise).float()).clamp(0, 1)
    return picture, torch.where(classes < len(CLASSES), classes, IGNORE)


def scenes(first: int, count: int) -> tuple[Tensor, Tensor]:
    """Thermal pictures [count, 3, 64, 64] and classes [count, 64, 64]."""
    made = [thermal(first + i) for i in range(count)]
    return GreyTriplicate()(torch.stack([p for p, _ in made])), torch.stack([y for _, y in made])


def mixed(count: int) -> Tensor:
    """Pictures without labels, [count, 3, 64, 64]: thermal ones, then grey parts of photographs, half each."""
    from eff_embedded.data import photograph

    half = count // 2
    parts = []
    for i in range(count - half):
        draw = generator(77, i)
        picture = photograph(PHOTOGRAPHS[i % len(PHOTOGRAPHS)]).convert("L")
        side = int(draw.integers(SIDE, min(picture.size) + 1))
        x, y = (int(draw.integers(0, s - side + 1)) for s in picture.size)
        part = picture.resize((SIDE, SIDE), box=(x, y, x + side, y + side))
        parts.append(torch.from_numpy(np.array(part)).float()[None] / 255)
    return torch.cat((scenes(2 * HELD_OUT, half)[0], GreyTriplicate()(torch.stack(parts))))
