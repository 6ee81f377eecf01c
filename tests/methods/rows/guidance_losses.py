"""Losses on what a diffusion transformer computes inside: student and loss are one module here."""

import torch
from method_table import kept_by_state, neighbour, normal, state_row
from torch import nn

HASTE = neighbour("packages/eff-guidance/tests/alignment/conftest.py").Setting
REPULSOR = neighbour("packages/eff-guidance/tests/memory_bank/conftest.py").Setting


class Training(nn.Module):
    """A student, and the loss that looks at it; ``forward`` is the student."""

    def __init__(self, student, make):
        super().__init__()
        self.student, self.make, self.loss = student, make, None

    def forward(self, x):
        return self.student(x, timestep=x.new_full((len(x),), 400.0), class_labels=torch.arange(len(x))).sample


def velocity(model, x, mask=None):
    return model(x)


def attach(model):
    model.loss = model.make(model.student)
    return model.loss


def haste(student):
    return HASTE.aligned(student)


def repulsor(student):
    return REPULSOR.repulsion(student)


def make_haste():
    return Training(HASTE.dit(), haste)


def make_repulsor():
    return Training(REPULSOR.dit(), repulsor)


def train_haste(model, x, mask=None):
    pictures = (x[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2) % 1).detach()
    model(x)
    return model.loss.losses(pictures).total


def train_repulsor(model, x, mask=None):
    model(x)
    return model.loss.loss().total


def row(name, make, train):
    return state_row(
        name,
        make,
        velocity,
        kind="loss",
        apply=attach,
        train=train,
        data=normal(3, 4, 8, 8),
        **kept_by_state(make, attach),
    )


ROWS = [row("alignment", make_haste, train_haste), row("memory_bank", make_repulsor, train_repulsor)]
