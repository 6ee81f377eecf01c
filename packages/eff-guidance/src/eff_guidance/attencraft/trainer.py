"""Training of the concepts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eff_guidance.attencraft.adapter import ConceptAdapter, denoiser
from eff_guidance.attencraft.config import AttenCraftConfig, Concept
from eff_guidance.attencraft.losses import attention_js_loss, masked_denoising_loss
from eff_guidance.attencraft.maps import normalize_map, refine_maps, resize_map
from eff_guidance.attencraft.masks import MaskKeeper
from eff_guidance.attencraft.noise import Noiser
from eff_guidance.attencraft.projections import train_projections
from eff_guidance.attencraft.reading import Reader, reader_of
from eff_guidance.attencraft.sampler import ConceptSampler, Draw
from eff_guidance.attencraft.store import AttentionStore, map_sizes
from eff_guidance.attencraft.words import add_words, spans


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step of training.

    Attributes:
        step: Its number, from 0.
        prompt: What it was about.
        loss: All together.
        instance: The denoising loss on the picture.
        attention: The attention loss.
        prior: The denoising loss on a prior picture; 0 without.
        refreshed: Whether new masks were taken.
    """

    step: int
    prompt: str
    loss: float
    instance: float
    attention: float
    prior: float
    refreshed: bool


class AttenCraftTrainer:
    """Learns several concepts from one picture of them.

    The pipeline holds the words and the trainable projections until `remove`.

    Args:
        pipe: A pipeline of Stable Diffusion 1, 2, XL or 3, or another with a reader of its own.
        latents: The picture as scaled latents, [1, C, H, W]; see `encode_latents`.
        concepts: What is on it.
        config: See `AttenCraftConfig`.
        reader: How the model reads a prompt, with gradients to its words; None for the pipeline's way.
        masks: Masks of the concepts and of the background, float [K + 1, H, W], if they are known; they then stay.
        prior: Latents and prompts of pictures that the model shall go on making.
        background: Column of the text that stands for the background; 0 is the start of the text.

    Raises:
        ValueError: a concept's word is unsuitable, the masks' number is wrong, or the model has no fitting layers.
    """

    def __init__(
        self,
        pipe: Any,
        latents: Tensor,
        concepts: Sequence[Concept],
        config: AttenCraftConfig | None = None,
        *,
        reader: Reader | None = None,
        masks: Tensor | None = None,
        prior: Sequence[tuple[Tensor, str]] = (),
        background: int = 0,
    ) -> None:
        self.config = config or AttenCraftConfig()
        self.pipe, self.concepts, self.latents = pipe, tuple(concepts), latents
        self.model = denoiser(pipe)
        self.sampler = ConceptSampler(
            concepts, self.config.sampling, template=self.config.template, seed=self.config.seed
        )
        self.keeper = MaskKeeper(self.config.threshold, self.config.similarity, self.config.refresh)
        self.cross_size, self.self_size = map_sizes(
            self.model, latents, self.config.cross_share, self.config.self_share
        )
        self.given = masks is not None
        if masks is not None:
            if masks.dim() != 3 or len(masks) != len(self.concepts) + 1:
                raise ValueError(f"masks {list(masks.shape)} for {len(self.concepts)} concepts and the background")
            self.keeper.masks = resize_map(masks.float(), self.self_size)
        self.noiser = Noiser(pipe.scheduler, self.config.seed)
        self.reader = reader or reader_of(pipe, latents)
        self.prior, self.background, self.step_number = tuple(prior), background, 0
        self.words = add_words(pipe, self.concepts)
        try:
            self.handle, self.layers = train_projections(self.model, self.config.train)
        except Exception:
            self.words.remove()
            raise
        self.parameters = [*(layer.weight for layer in self.layers.values()), *self.words.rows.values()]
        self.frozen = _freeze(pipe, self.parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.config.learning_rate, weight_decay=self.config.weight_decay
        )

    @property
    def masks(self) -> Tensor | None:
        """Masks of the concepts and, last, of the background, float32 [K + 1, H, W]; None before the first step."""
        return self.keeper.masks

    def find_masks(self) -> Tensor:
        """Find the first masks without training: the model looks once at the picture with all concepts in the prompt.

        Raises:
            ValueError: the maps are not clear enough, or the model has no layers of the asked sizes.
        """
        with torch.no_grad(), ExitStack() as stores:
            self._look(self.sampler.all(), self.config.mask_time, stores, refresh=True)
        assert self.keeper.masks is not None
        return self.keeper.masks

    def step(self) -> StepReport:
        """One update.

        Raises:
            ValueError: the first masks are not clear enough.
        """
        if self.keeper.masks is None:
            self.find_masks()
        due = not self.given and self.keeper.due(self.step_number)
        draw = self.sampler.all() if due else self.sampler.next()
        with ExitStack() as stores:
            return self._learn(draw, stores, due)

    def _learn(self, draw: Draw, stores: ExitStack, due: bool) -> StepReport:
        pred, target, maps, refreshed = self._look(draw, (0.0, 1.0), stores, refresh=due)
        masks = self.keeper.masks
        assert masks is not None
        used = torch.tensor([*draw.concepts, len(self.concepts)])
        wanted = masks.to(maps)[used]
        attention = attention_js_loss(maps, resize_map(wanted, (maps.shape[1], maps.shape[2])))
        cover = resize_map(wanted[:-1].amax(0)[None], (pred.shape[2], pred.shape[3]))[0]
        instance = masked_denoising_loss(pred, target, cover, self.config.background_weight)
        prior = self._prior()
        loss = instance + self.config.prior_weight * prior + self.config.attention_weight * attention
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        inside = {i: float((maps[n].detach() * wanted[n]).sum() / wanted[n].sum()) for n, i in enumerate(draw.concepts)}
        self.sampler.update(inside)
        values = [float(x.detach()) for x in (loss, instance, attention, prior)]
        report = StepReport(self.step_number, draw.prompt, values[0], values[1], values[2], values[3], refreshed)
        self.step_number += 1
        return report

    def fit(self) -> ConceptAdapter:
        """Train for the rest of ``config.steps`` and return what was learnt."""
        while self.step_number < self.config.steps:
            self.step()
        return self.adapter()

    def adapter(self) -> ConceptAdapter:
        """What is learnt so far, as copies."""
        return ConceptAdapter(
            self.concepts,
            {name: layer.weight.detach().cpu().clone() for name, layer in self.layers.items()},
            {part: rows.detach().cpu().clone() for part, rows in self.words.rows.items()},
        )

    def remove(self) -> None:
        """Give the pipeline back as it was; may be called again."""
        self.handle.remove()
        self.words.remove()
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        self.frozen = []

    def _look(
        self, draw: Draw, times: tuple[float, float], stores: ExitStack, *, refresh: bool
    ) -> tuple[Tensor, Tensor, Tensor, bool]:
        """Prediction, target, maps from 0 to 1 of the drawn concepts and the background, and whether masks are new."""
        reading = self.reader(draw.prompt)
        places = spans(reading.tokens, self.concepts)
        if lost := [self.concepts[i].token for i in draw.concepts if i not in places]:
            raise ValueError(f"{lost} are not in the prompt {draw.prompt!r} as the text encoder reads it")
        tokens = [t for i in draw.concepts for t in places[i]]
        store = AttentionStore(
            self.model, [*tokens, self.background], cross_size=self.cross_size,
            self_size=self.self_size if refresh else None,
            where=self.config.blocks,
        )  # fmt: skip
        stores.enter_context(store)
        pred, target = self.noiser.predict(self.model, self.latents, reading.arguments, times)
        cross, own = store.cross, store.self_attention
        if cross is None or (refresh and own is None):
            raise ValueError(
                f"{type(self.model).__name__} has no attention of {self.cross_size} places to text and "
                f"{self.self_size} among themselves; change cross_share and self_share"
            )
        counts = [len(places[i]) for i in draw.concepts]
        heads, groups, start = [], [], 0
        for count in counts:
            heads.append(cross[start])
            groups.append(cross[start : start + count].amax(0))
            start += count
        refreshed = False
        if refresh and own is not None:
            stack = torch.stack([*groups, cross[-1]]).detach()
            refreshed = self.keeper.offer(refine_maps(stack, own, self.self_size, power=self.config.power))
        maps = resize_map(normalize_map(torch.stack([*heads, cross[-1]])), self.self_size)
        return pred, target, maps, refreshed

    def _prior(self) -> Tensor:
        if not self.prior or not self.config.prior_weight:
            return torch.zeros((), device=self.latents.device)
        latents, prompt = self.prior[self.step_number % len(self.prior)]
        pred, target = self.noiser.predict(self.model, latents, self.reader(prompt).arguments, (0.0, 1.0))
        return (pred.float() - target.float()).square().mean()


def _freeze(pipe: Any, but: Sequence[Tensor]) -> list[nn.Parameter]:
    """Switch off the gradients of all other parameters, and return those that had them."""
    kept = {id(p) for p in but}
    found = [
        p for part in pipe.components.values() if isinstance(part, nn.Module) for p in part.parameters()
        if p.requires_grad and id(p) not in kept
    ]  # fmt: skip
    for parameter in found:
        parameter.requires_grad_(False)
    return found


@torch.no_grad()
def encode_latents(pipe: Any, image: Any) -> Tensor:
    """Scaled latents [1, C, h, w] of a PIL picture or a tensor [3, H, W] from 0 to 1, in the VAE's dtype."""
    pixels = pipe.image_processor.preprocess(image[None] if isinstance(image, Tensor) else image.convert("RGB"))
    vae = pipe.vae
    z = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    made: Tensor = (z - shift) * vae.config.scaling_factor
    return made
