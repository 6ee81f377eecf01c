"""A recipe in a loop of your own: no run folder, no command, the same updates.

uv run --extra train examples/train_digits.py
"""

import torch
from eff_train import registry
from eff_train.frame import Training, Workers

recipe_class = registry.load("digits")
recipe = recipe_class(recipe_class.config_class(steps=60, warmup=5, seed=0))
training = Training(recipe, Workers(0, 1, torch.device("cpu")))
for step in range(60):
    training.update()
    if step % 20 == 19:
        print(step + 1, {name: round(value, 3) for name, value in training.read_means().items()})
with training.judged() as model:
    print("held out:", recipe.evaluate(model))
