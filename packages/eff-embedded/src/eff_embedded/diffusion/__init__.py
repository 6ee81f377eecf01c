"""Collage diffusion: a small text-to-picture model of diffusers' own classes that needs no download.

>>> pipe = load_collage_diffusion()
>>> pipe("A dog is left of an apple on a blue background.", seed=0).images[0].save("dog.png")
"""

from eff_embedded.diffusion.load import TRANSFORMER, VAE, collage_pipeline, load_collage_diffusion
from eff_embedded.diffusion.prompts import Prompts
from eff_embedded.diffusion.score import Case, Estimate, Score, judged, pairs, score
from eff_embedded.diffusion.world import GROUNDS, OBJECTS, Example, example

__all__ = [
    "GROUNDS",
    "OBJECTS",
    "TRANSFORMER",
    "VAE",
    "Case",
    "Estimate",
    "Example",
    "Prompts",
    "Score",
    "collage_pipeline",
    "example",
    "judged",
    "load_collage_diffusion",
    "pairs",
    "score",
]
