"""The parts of a training: a recipe, its config, the loop and a run's folder. Each is small and usable alone."""

from eff_train.frame.data import HELD_OUT, generator, shuffled, torch_generator
from eff_train.frame.loop import train
from eff_train.frame.options import TrainConfig
from eff_train.frame.parallel import Workers, workers
from eff_train.frame.recipe import Recipe, as_built
from eff_train.frame.training import Training

__all__ = [
    "HELD_OUT",
    "Recipe",
    "TrainConfig",
    "Training",
    "Workers",
    "as_built",
    "generator",
    "shuffled",
    "torch_generator",
    "train",
    "workers",
]
