"""Settings of learning several concepts from one picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eff_kernels.edit import Settings

Sampling = Literal["uniform", "reweighted"]
Projection = Literal["k", "v", "q", "out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Concept:
    """One thing on the picture.

    Attributes:
        token: Its new word, such as "<new1>".
        init_word: A word that the text encoder knows as one piece; the new word starts as it.
        words: Further words that follow the new one in prompts, such as "red cat"; their maps help to find its mask.
    """

    token: str
    init_word: str
    words: str = ""

    def __post_init__(self) -> None:
        if not self.token.strip() or self.token != self.token.strip() or " " in self.token:
            raise ValueError(f"token={self.token!r}; use one word without spaces, such as '<new1>'")
        if not self.init_word.strip():
            raise ValueError("init_word is empty; use a word that the text encoder knows, such as 'cat'")

    @property
    def phrase(self) -> str:
        """How prompts name it."""
        return f"{self.token} {self.words}" if self.words else self.token


@dataclass(frozen=True, slots=True, kw_only=True)
class AttenCraftConfig(Settings):
    """How concepts are learnt; the defaults are those of the published code for Stable Diffusion 2.1 at batch 1.

    Attributes:
        steps: Updates.
        learning_rate: Of AdamW, as it is; the published 5e-5 is doubled there because of the prior pictures.
        weight_decay: Of AdamW.
        clip: Largest norm of all gradients together.
        train: Projections that are trained: those of text keys and values, if asked for queries and outputs too.
        attention_weight: Weight of the attention loss.
        prior_weight: Weight of the loss on prior pictures.
        background_weight: How much of the error outside of the masks counts: 0 none, 1 as inside. 0.5 is what the
            published code comes to.
        threshold: By how much a map must exceed all others for a place to belong to it.
        power: Of the self-attention that spreads maps over regions.
        refresh: Steps between attempts to find better masks.
        similarity: Least SSIM of each new mask with the last accepted one.
        mask_time: Range of times in which the first masks are found, shares of the whole noise schedule.
        cross_share: Side of the cross-attention maps as a share of the latents' side.
        self_share: Side of the self-attention maps and of the masks, likewise. Models with joint attention have one
            side only, and both shares are ignored there.
        blocks: Patterns of the names of attention modules whose maps are used; None for all of the right size.
        sampling: "uniform": one concept or all, each as likely. "reweighted": those that get little attention more
            often.
        template: Prompt; {} is where the concepts go.
        seed: Of noise, times and prompts.
    """

    steps: int = 500
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    clip: float = 1.0
    train: tuple[Projection, ...] = ("k", "v")
    attention_weight: float = 1.0
    prior_weight: float = 1.0
    background_weight: float = 0.5
    threshold: float = 0.1
    power: int = 4
    refresh: int = 20
    similarity: float = 0.8
    mask_time: tuple[float, float] = (0.0, 0.3)
    cross_share: float = 0.25
    self_share: float = 0.5
    blocks: tuple[str, ...] | None = None
    sampling: Sampling = "uniform"
    template: str = "a photo of {}"
    seed: int = 0

    def check(self) -> None:
        """See `Settings`."""
        for name in ("steps", "power", "refresh"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; use at least 1")
        for name in ("attention_weight", "prior_weight", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}; use at least 0")
        for name in ("background_weight", "similarity", "threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; use a number from 0 to 1")
        if self.learning_rate <= 0 or self.clip <= 0:
            raise ValueError(f"learning_rate={self.learning_rate}, clip={self.clip}; use numbers above 0")
        if not 0 <= self.mask_time[0] < self.mask_time[1] <= 1:
            raise ValueError(f"mask_time={self.mask_time}; use two shares of the schedule, the lower one first")
        if not 0 < self.cross_share <= 1 or not 0 < self.self_share <= 1:
            raise ValueError(
                f"cross_share={self.cross_share}, self_share={self.self_share}; use numbers above 0, at most 1"
            )
        if self.template.count("{}") != 1:
            raise ValueError(f"template={self.template!r}; it needs one {{}} for the concepts")
        if not self.train:
            raise ValueError("train is empty; use at least one of k, v, q, out")
