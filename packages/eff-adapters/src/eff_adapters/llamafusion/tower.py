"""A text model with a second set of weights for picture tokens: one forward for reading and drawing."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from eff_kernels.edit import Handle, Report
from eff_kernels.edit.caches import cache_kwargs, returned_cache
from torch import Tensor, nn

from eff_adapters.llamafusion import losses
from eff_adapters.llamafusion.attach import attach, decoder_of, mean_row, tower_parameters
from eff_adapters.llamafusion.config import ModalityTowerConfig
from eff_adapters.llamafusion.heads import make_head
from eff_adapters.llamafusion.layout import check_layout, times_of_training
from eff_adapters.llamafusion.masks import host_mask, picture_blocks
from eff_adapters.llamafusion.routing import ARGUMENT, Routing, current
from eff_adapters.llamafusion.schedule import add_noise, noise_of_sample, noise_of_velocity, velocity


class ModalityOutput(NamedTuple):
    """What one forward gives.

    Attributes:
        loss: ``lm_loss + loss_lambda * diffusion_loss``, float32; None without labels and pictures to denoise.
        lm_loss: Mean cross-entropy over text targets; None without labels.
        diffusion_loss: Mean squared error of what is predicted, such as the noise, over all elements; None without
            pictures to denoise.
        noise_pred: [pictures, c, s, s]; None without pictures.
        logits: [batch, tokens, vocabulary], wide enough for the two markers; 0 at picture tokens.
        lm_losses: Mean cross-entropy of each row, [batch], or None.
        image_losses: Mean squared error of each picture that is denoised, or None.
        past_key_values: The cache, or None.
    """

    loss: Tensor | None
    lm_loss: Tensor | None
    diffusion_loss: Tensor | None
    noise_pred: Tensor | None
    logits: Tensor
    lm_losses: Tensor | None
    image_losses: Tensor | None
    past_key_values: Any


class ModalityTower(nn.Module):
    """A causal language model of transformers that also reads and draws pictures; made by `add_modality_tower`.

    Calls of ``model`` itself, its ``generate`` included, run the text weights alone, bit for bit as before.

    Attributes:
        model: The language model, changed in place.
        head: From latents to tokens and from hidden states to noise.
        marker_in: Embeddings of the opening and closing marker, [2, hidden].
        marker_out: Rows of the two markers beside those of ``lm_head``, [2, hidden].
        vae: Turns pixels into latents, or None.
    """

    def __init__(self, model: Any, config: ModalityTowerConfig, vae: Any = None) -> None:
        super().__init__()
        decoder = decoder_of(model)
        self.model, self.config, self.vae = model, config, vae
        self._flags = {n: p.requires_grad for n, p in model.named_parameters()}
        self._kept = {n: p.detach().clone() for n, p in model.named_parameters()} if config.trains_text else {}
        model.requires_grad_(config.trains_text)
        self._handle: Handle | None = attach(decoder, config)
        table, out = model.get_input_embeddings().weight, model.lm_head.weight
        like = {"device": table.device, "dtype": table.dtype if table.is_floating_point() else torch.float32}
        self.head: Any = make_head(config, decoder.config.hidden_size).to(**like)
        self.marker_in = nn.Parameter(mean_row(table).to(**like))
        self.marker_out = nn.Parameter(mean_row(out).to(**like))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}  # the undoing belongs to the original's modules

    @property
    def decoder(self) -> Any:
        """The model's decoder."""
        return self.model.get_decoder()

    @property
    def report(self) -> Report:
        """Which modules got a counterpart."""
        return self._live().report

    def _live(self) -> Handle:
        if self._handle is None:
            raise RuntimeError("this is a copy of a tower; the original can be removed, a copy cannot")
        return self._handle

    def remove(self) -> None:
        """Give the language model back as it was, bit for bit; the tower is of no use afterwards.

        Text weights that were quantised since stay so.

        Raises:
            RuntimeError: text weights that the tower trains were quantised since, or are under an adapter; nothing has
                changed then.
        """
        handle = self._live()
        if not handle.active:
            return
        left = {name.replace(".text.", ".") for name, _ in self.model.named_parameters()}
        if lost := [name for name in self._kept if name not in left]:
            raise RuntimeError(
                f"{lost[0]} is no longer a plain weight (quantised since, or under an adapter): its value before "
                "training cannot be put back"
            )
        handle.remove()
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in self._kept.items():
                parameters[name].copy_(value)
        for name, flag in self._flags.items():
            if name in parameters:
                parameters[name].requires_grad_(flag)

    def picture_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the picture side by name: tower, head and markers."""
        own = {n: p for n, p in self.named_parameters() if not n.startswith(("model.", "vae."))}
        return {**{f"tower.{n}": p for n, p in tower_parameters(self.decoder).items()}, **own}

    def text_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the language model by its names, without those of the picture side."""
        ours = {id(p) for p in self.picture_parameters().values()}
        return {n.replace(".text.", "."): p for n, p in self.model.named_parameters() if id(p) not in ours}

    def param_groups(self, lr: float = 1e-4, weight_decay: float = 0.1) -> list[dict[str, Any]]:
        """Groups for an optimiser: matrices with weight decay, the rest without; text at its share of the rate.

        Text has no group when ``text_lr_ratio`` is 0.
        """
        groups: list[dict[str, Any]] = []
        for name, some, rate in (
            ("picture", self.picture_parameters(), lr),
            ("text", self.text_parameters(), lr * self.config.text_lr_ratio),
        ):
            if rate == 0:
                continue
            for matrices, decay in ((True, weight_decay), (False, 0.0)):
                chosen = [p for n, p in some.items() if _is_matrix(n, p) == matrices]
                groups.append({"name": name, "params": chosen, "lr": rate, "weight_decay": decay})
        return groups

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embeddings [..., hidden] of token ids, the two markers from their own rows."""
        table = self.model.get_input_embeddings()
        marks = self.marks(input_ids)
        if not (marks >= 0).any():
            return table(input_ids)
        plain = table(input_ids.masked_fill(marks >= 0, 0))
        return torch.where((marks >= 0)[..., None], self.marker_in[marks.clamp(min=0)].to(plain.dtype), plain)

    def marks(self, input_ids: Tensor) -> Tensor:
        """0 at opening markers, 1 at closing ones, -1 elsewhere."""
        opens, closes = input_ids == self.config.boi_token_id, input_ids == self.config.eoi_token_id
        return torch.where(opens, 0, torch.where(closes, 1, -1))

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Logits of text hidden states [..., hidden] by the frozen head, with those of the markers in their columns."""
        plain = self.model.lm_head(hidden)
        markers = torch.nn.functional.linear(hidden, self.marker_out.to(hidden.dtype)).to(plain.dtype)
        ids = [self.config.boi_token_id, self.config.eoi_token_id]
        wide = torch.nn.functional.pad(plain, (0, max(0, max(ids) + 1 - plain.shape[-1])), value=-torch.inf)
        return wide.index_copy(-1, torch.tensor(ids, device=wide.device), markers)

    def run(self, embeds: Tensor, modality_ids: Tensor, mask: Any, positions: Tensor, cache: Any, **more: Any) -> Any:
        """The decoder on embeddings; each token through the weights of its modality. Gives the host's output."""
        routing = Routing.of(modality_ids)
        token = current.set(routing)  # for the final norm, which gets no arguments
        try:
            return self.model.base_model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                use_cache=cache is not None,
                **cache_kwargs(self.model.base_model, cache),
                **({} if routing is None else {ARGUMENT: routing}),
                **more,
            )
        finally:
            current.reset(token)

    def forward(
        self,
        input_ids: Tensor,
        modality_ids: Tensor | None = None,
        *,
        latents: Tensor | None = None,
        pixels: Tensor | None = None,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        clean: Tensor | None = None,
        image_first: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> ModalityOutput:
        """Read rows of text and pictures, and predict the next tokens and the noise.

        Args:
            input_ids: int64 [batch, tokens]; ignored at picture tokens.
            modality_ids: [batch, tokens], 0 text and 1 picture; None is all text.
            latents: Clean latents of all pictures, row by row, float [pictures, c, s, s].
            pixels: In their place pictures from -1 to 1, [pictures, 3, h, w], for the VAE.
            timesteps: int64 [pictures]; None draws them, evenly.
            noise: Like ``latents``; None draws it.
            clean: bool [pictures]: given as they are, at time 0, and not in the loss (to be read, or edited).
            image_first: bool [pictures]: come before their text, which limits drawn time steps to
                ``max_t_when_image_first``; None takes those that no text stands before.
            labels: int64 [batch, tokens], -100 where there is no target; pictures and what follows one are none.
            attention_mask: [batch, all tokens], 0 at padding, all rows padded on one side.
            past_key_values: A cache of earlier tokens, which these are added to.
            generator: For what is drawn.
            kwargs: For the model, such as ``pixel_values`` of its own eyes.

        Raises:
            ValueError: a block of picture tokens is not ``tokens_per_image`` long (also where a cache cuts it) or has
                no opening marker, an opening marker has no block, numbers of pictures differ, rows are padded on
                different sides, pixels come without a VAE.
        """
        if pixels is not None:
            latents = self.encode(pixels)
        modality_ids = torch.zeros_like(input_ids) if modality_ids is None else modality_ids
        blocks = picture_blocks(modality_ids, self.config.tokens_per_image)
        positions = losses.positions(input_ids, attention_mask, past_key_values)
        check_layout(input_ids, blocks, attention_mask, latents, self.config, past_key_values)
        if latents is None:
            return self._text(input_ids, labels, attention_mask, positions, past_key_values, kwargs)
        latents = latents.float()
        clean = torch.zeros(len(latents), dtype=torch.bool) if clean is None else clean
        clean = clean.to(latents.device)
        timesteps = times_of_training(timesteps, clean, image_first, blocks, attention_mask, self.config, generator)
        if noise is None:
            # drawn on the CPU: the same for a seed on all devices
            noise = torch.randn(latents.shape, generator=generator, device=generator.device if generator else "cpu")
        noise = noise.to(latents)
        noised = add_noise(latents, noise, timesteps, self.config.num_train_timesteps)
        read = self.head.read(torch.where(clean.view(-1, 1, 1, 1), latents, noised), timesteps)
        is_picture = blocks >= 0
        embeds = self.embed(input_ids.masked_fill(is_picture, 0))
        embeds = embeds.masked_scatter(is_picture[..., None], read.tokens.to(embeds.dtype))
        mask = host_mask(self.decoder.config, embeds, attention_mask, past_key_values, positions, blocks)
        out = self.run(embeds, modality_ids, mask, positions, past_key_values, **kwargs)
        hidden = out.last_hidden_state
        written = self.head.write(hidden[is_picture].to(read.tokens.dtype).view_as(read.tokens), read.skips, timesteps)
        wanted = self.wanted_of(latents, noise, timesteps)
        text = self.logits_of(hidden[~is_picture])
        logits = text.new_zeros(*input_ids.shape, text.shape[-1]).index_put((~is_picture,), text)  # by whole rows
        lm_loss, lm_losses = losses.language(logits, labels, is_picture, attention_mask)
        image_loss, image_losses = losses.diffusion(written, wanted, ~clean)
        total = losses.total(lm_loss, image_loss, self.config.loss_lambda)
        noise_pred = self.noise_of(written, noised, timesteps)
        return ModalityOutput(
            total, lm_loss, image_loss, noise_pred, logits, lm_losses, image_losses, returned_cache(out)
        )

    def _text(
        self, ids: Tensor, labels: Tensor | None, mask: Tensor | None, positions: Tensor, cache: Any, kwargs: Any
    ) -> ModalityOutput:
        """Rows without a picture: the model's own code, on token ids unless there are markers."""
        marked = bool((self.marks(ids) >= 0).any())
        given = {"inputs_embeds": self.embed(ids)} if marked else {"input_ids": ids}
        out = self.model.base_model(
            **given,
            attention_mask=mask,
            position_ids=None if mask is None else positions,
            use_cache=cache is not None,
            **cache_kwargs(self.model.base_model, cache),
            **kwargs,
        )
        hidden = out.last_hidden_state
        logits = self.logits_of(hidden) if marked else self.model.lm_head(hidden)
        lm_loss, lm_losses = losses.language(logits, labels, torch.zeros_like(ids, dtype=torch.bool), mask)
        return ModalityOutput(lm_loss, lm_loss, None, None, logits, lm_losses, None, returned_cache(out))

    def wanted_of(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the head's output is compared with for clean latents [n, c, s, s] and their noise at times t [n]."""
        if self.config.prediction == "noise":
            return noise
        if self.config.prediction == "sample":
            return latents
        return velocity(latents, noise, t, self.config.num_train_timesteps)

    def noise_of(self, written: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """The noise that the head's output [n, c, s, s] means for noised latents at times t [n]."""
        if self.config.prediction == "noise":
            return written
        if self.config.prediction == "sample":
            return noise_of_sample(noised, written, t, self.config.num_train_timesteps)
        return noise_of_velocity(noised, written, t, self.config.num_train_timesteps)

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of pictures [n, 3, h, w] from -1 to 1.

        Raises:
            ValueError: the tower has no VAE.
        """
        vae = self._need_vae()
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        with torch.no_grad():
            return (vae.encode(pixels).latent_dist.mode() - shift) * vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [n, 3, h, w] from -1 to 1 of latents.

        Raises:
            ValueError: the tower has no VAE.
        """
        vae = self._need_vae()
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        with torch.no_grad():
            return vae.decode(latents / vae.config.scaling_factor + shift).sample

    def _need_vae(self) -> Any:
        if self.vae is None:
            raise ValueError("pixels need a VAE; pass vae= to add_modality_tower, or give latents")
        return self.vae


def add_modality_tower(model: Any, config: ModalityTowerConfig, *, vae: Any = None) -> ModalityTower:
    """Give a Llama-type model a second set of weights for picture tokens (LMFusion, arXiv 2412.15188).

    The model is changed in place; what it does with text alone stays as it is, bit for bit.

    Args:
        model: A causal language model of transformers (Llama, Mistral, Qwen3 and their like).
        config: What the tower is made of.
        vae: For pixels: an autoencoder of diffusers; frozen here.

    Raises:
        ValueError: the model is of another build, or its weights do not train and ``image_rank`` is None.
    """
    if vae is not None:
        vae.requires_grad_(False)
    return ModalityTower(model, config, vae)


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.dim() >= 2 and not name.startswith("marker_")
