"""What a model has read so far: a cache that text and finished pictures are added to, and that drawing looks at."""

from __future__ import annotations

import copy
from typing import Any

import torch
from eff_kernels.edit.caches import cache_kwargs
from torch import Tensor

from eff_adapters.llamafusion import losses
from eff_adapters.llamafusion.masks import host_mask
from eff_adapters.llamafusion.schedule import add_noise
from eff_adapters.llamafusion.tower import ModalityTower


class Context:
    """Rows of text and pictures in a cache.

    Text is read by the language model alone, part by part, so what it reads before a picture is bit-identical to the
    model without a tower.

    Args:
        tower: The model.
        attention_mask: [batch, tokens] of what `read_text` will get first, 0 at padding on the left; None is all ones.

    Attributes:
        hidden: Last hidden state of what was read last, [batch, tokens, hidden].
    """

    def __init__(self, tower: ModalityTower, attention_mask: Tensor | None = None) -> None:
        from transformers import DynamicCache

        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("prompts are padded on the right; pad them on the left")
        self.tower, self.mask = tower, attention_mask
        self.cache = DynamicCache(config=tower.decoder.config)
        self.hidden: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self.cache.get_seq_length())

    def read_text(self, input_ids: Tensor) -> Tensor:
        """Add text, int64 [batch, tokens]; gives the logits behind its last token, [batch, vocabulary and markers]."""
        tower, mask = self.tower, self._grown(input_ids.shape[1])
        marked = bool((tower.marks(input_ids) >= 0).any())
        given = {"inputs_embeds": tower.embed(input_ids)} if marked else {"input_ids": input_ids}
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, self.length :]
        out = tower.model.base_model(
            **given,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **cache_kwargs(tower.model.base_model, self.cache),
        )
        self.mask, self.hidden = mask, out.last_hidden_state
        return tower.logits_of(self.hidden[:, -1:])[:, 0]

    def read_picture(self, latents: Tensor) -> None:
        """Add clean pictures, one a row, between their markers; latents [batch, c, s, s]."""
        config, batch = self.tower.config, len(latents)
        ids = torch.full((batch, 1), config.boi_token_id, device=latents.device)
        self.read_text(ids)
        self.write_picture(latents)
        self.read_text(torch.full_like(ids, config.eoi_token_id))

    def write_picture(self, latents: Tensor) -> None:
        """Add the tokens of clean pictures alone; the marker before them is there already."""
        self._through(latents, torch.zeros(len(latents), dtype=torch.long, device=latents.device), self.cache)
        self.mask = self._grown(self.tower.config.tokens_per_image)

    def select(self, rows: Tensor) -> Context:
        """Some of the rows, int64 [n], in a context of their own; a row may come several times."""
        made = copy.copy(self)
        made.hidden = None if self.hidden is None else self.hidden[rows]
        made.mask = None if self.mask is None else self.mask[rows]
        made.cache = self._fork()
        made.cache.batch_select_indices(rows)
        return made

    def predict(self, latents: Tensor, t: Tensor) -> Tensor:
        """Noise of noised latents [batch, c, s, s] at times t [batch], seen from here; the cache stays as it is."""
        return self.tower.noise_of(self._through(latents, t, self._fork()), latents, t)

    def denoising_loss(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The diffusion loss of clean latents [batch, c, s, s], for each; float32 [batch].

        It is that of `ModalityTower.forward` for pictures that nothing follows, at the cost of their own tokens: what
        was read without gradients is not computed again. Text weights that train get no gradient from that.
        """
        noised = add_noise(latents, noise, t, self.tower.config.num_train_timesteps)
        written = self._through(noised, t, self._fork())
        return losses.errors(written, self.tower.wanted_of(latents, noise, t))

    def _fork(self) -> Any:
        # Layers of a cache put new tensors in the place of old ones, so copies of the layers leave this cache alone.
        fork = copy.copy(self.cache)
        fork.layers = [copy.copy(layer) for layer in self.cache.layers]
        return fork

    def _through(self, latents: Tensor, t: Tensor, cache: Any) -> Tensor:
        """What the head writes for noised latents."""
        tower = self.tower
        read = tower.head.read(latents, t)
        embeds = read.tokens.to(tower.marker_in.dtype)
        batch, n = embeds.shape[:2]
        blocks = torch.zeros(batch, n, dtype=torch.long, device=embeds.device)
        mask = self._grown(n)
        positions = torch.arange(self.length, self.length + n, device=embeds.device).expand(batch, -1)
        if mask is not None:
            positions = (mask.cumsum(1) - 1)[:, -n:]
        allowed = host_mask(tower.decoder.config, embeds, mask, cache, positions, blocks)
        out = tower.run(embeds, torch.ones_like(blocks), allowed, positions, cache)
        return tower.head.write(out.last_hidden_state.to(read.tokens.dtype), read.skips, t)

    def _grown(self, by: int) -> Tensor | None:
        if self.mask is None or (self.length == 0 and self.mask.shape[1] == by):
            return self.mask
        return torch.nn.functional.pad(self.mask, (0, by), value=1)
