"""How much a vision-language model invents: CHAIR, POPE, AMBER and MMHal as exact formulas, with intervals.

Vocabularies are the caller's: a table from each object to the words that mean it.
"""

from eff_attention.hallucination.amber import (
    AmberGenerative,
    amber_discriminative,
    amber_generative,
    amber_score,
    mmhal,
)
from eff_attention.hallucination.bootstrap import Interval, bootstrap
from eff_attention.hallucination.chair import ChairResult, chair, distinct_n
from eff_attention.hallucination.pope import PopeScores, Question, build_pope, pope_parse, pope_scores
from eff_attention.hallucination.vocabulary import Vocabulary

__all__ = [
    "AmberGenerative",
    "ChairResult",
    "Interval",
    "PopeScores",
    "Question",
    "Vocabulary",
    "amber_discriminative",
    "amber_generative",
    "amber_score",
    "bootstrap",
    "build_pope",
    "chair",
    "distinct_n",
    "mmhal",
    "pope_parse",
    "pope_scores",
]
