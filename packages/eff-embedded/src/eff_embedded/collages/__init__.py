"""Collages: layered pictures of drawn objects with captions, questions, relations and masks, all exact.

``sample(seed, config)`` draws one; the same seed and config give the same collage on every machine.
"""

from eff_embedded.collages.captions import Caption, caption
from eff_embedded.collages.config import CollageConfig
from eff_embedded.collages.grounds import Ground
from eff_embedded.collages.layout import Layout, Placed, sample_layout
from eff_embedded.collages.questions import QUESTION_KINDS, Question, questions
from eff_embedded.collages.relations import OPPOSITE, PLACES, RELATION_KINDS, Relation
from eff_embedded.collages.render import Collage, composite, render, sample, stack
from eff_embedded.collages.vocabulary import Mention, Thing, class_noun, classes, everyday_pairs, find, thing, things

__all__ = [
    "OPPOSITE",
    "PLACES",
    "QUESTION_KINDS",
    "RELATION_KINDS",
    "Caption",
    "Collage",
    "CollageConfig",
    "Ground",
    "Layout",
    "Mention",
    "Placed",
    "Question",
    "Relation",
    "Thing",
    "caption",
    "class_noun",
    "classes",
    "composite",
    "everyday_pairs",
    "find",
    "questions",
    "render",
    "sample",
    "sample_layout",
    "stack",
    "thing",
    "things",
]
