"""What several sub-commands share: loading a recipe with its libraries, opening a run with its model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from eff_train import registry
from eff_train.errors import refusing
from eff_train.frame.checkpoint import Checkpoint
from eff_train.frame.parallel import pick_device
from eff_train.frame.randomness import own_randomness, seed_all
from eff_train.frame.recipe import Recipe
from eff_train.frame.runs import Run, choose_checkpoint, read_checkpoint
from eff_train.frame.training import load_weights


def say(text: str) -> None:
    """A line on standard error."""
    sys.stderr.write(text + "\n")


def import_recipe(name: str, argv: Sequence[str]) -> type[Recipe[Any]]:
    """The recipe's class, with the libraries that its file imports. ``argv`` repeats the command with them."""
    try:
        with refusing():
            return registry.load(name)
    except ModuleNotFoundError as error:
        need([(error.name or "").partition(".")[0]], argv)
        raise


def load_recipe(name: str, argv: Sequence[str]) -> type[Recipe[Any]]:
    """The recipe's class, all of its libraries present."""
    recipe = import_recipe(name, argv)
    need(recipe.needs, argv)
    return recipe


def need(modules: Iterable[str], argv: Sequence[str]) -> None:
    """See that libraries are there; ``argv`` repeats the command with them."""
    from eff_embedded.launch import ensure

    ensure(modules, command="eff-train", argv=argv, extra="train", install="eff-train[recipes]")


@contextmanager
def opened(
    folder: Path, which: str, device: str, argv: Sequence[str]
) -> Iterator[tuple[Run, Recipe[Any], nn.Module, Checkpoint]]:
    """A run's recipe and its model from a checkpoint (average if it has one), in evaluation mode, without gradients."""
    import torch

    with refusing():
        run = Run(folder)
        name = run.recipe_name()
    cls = load_recipe(name, argv)
    with refusing():
        config = run.config(cls.config_class)
        found = choose_checkpoint(run, which, cls.best, say)
    recipe = cls(config, pick_device(device))
    if config.threads:
        torch.set_num_threads(config.threads)
    seed_all(config.seed)
    model = recipe.build().to(recipe.device)
    state = read_checkpoint(found)
    load_weights(model, state["weights"] | state["average"])
    with own_randomness(config.seed), torch.no_grad():
        yield run, recipe, model.eval(), found
