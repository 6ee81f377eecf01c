"""SENTINEL: pairs of sentences from a model's own samples, and preference training on them, against invented objects.

Peng, Yang, Jiang, Dong, Feng: "Mitigating Object Hallucinations via Sentence-Level Early Intervention", ICCV 2025,
arXiv 2507.12455. No labels and no larger model: two detectors vote on the objects that each sentence names.
"""

from eff_adapters.sentinel.build import Built, Sentence, SentenceGenerator, SentinelDataBuilder
from eff_adapters.sentinel.collate import ContextPreferenceCollator
from eff_adapters.sentinel.config import CDPOConfig, SentinelConfig
from eff_adapters.sentinel.detectors import ZeroShotDetector
from eff_adapters.sentinel.intervene import intervene
from eff_adapters.sentinel.loss import CDPOLoss, c_dpo_loss, sentence_logps
from eff_adapters.sentinel.pairs import PreferencePair, load_pairs, save_pairs
from eff_adapters.sentinel.sampler import SentenceSampler, answer_prefix
from eff_adapters.sentinel.text import ObjectTable, split_sentences
from eff_adapters.sentinel.train import Update, add_lora, c_dpo_step, pair_logps, train_c_dpo
from eff_adapters.sentinel.votes import Detector, Judged, Jury, classify_object, judge_sentence

__all__ = [
    "Built",
    "CDPOConfig",
    "CDPOLoss",
    "ContextPreferenceCollator",
    "Detector",
    "Judged",
    "Jury",
    "ObjectTable",
    "PreferencePair",
    "Sentence",
    "SentenceGenerator",
    "SentenceSampler",
    "SentinelConfig",
    "SentinelDataBuilder",
    "Update",
    "ZeroShotDetector",
    "add_lora",
    "answer_prefix",
    "c_dpo_loss",
    "c_dpo_step",
    "classify_object",
    "intervene",
    "judge_sentence",
    "load_pairs",
    "pair_logps",
    "save_pairs",
    "sentence_logps",
    "split_sentences",
    "train_c_dpo",
]
