"""Drawing pictures, and text with pictures in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eff_adapters.llamafusion.context import Context
from eff_adapters.llamafusion.schedule import ddim_step, sampling_times
from eff_adapters.llamafusion.tower import ModalityTower


@torch.no_grad()
def generate_image(
    tower: ModalityTower,
    prompt: Tensor | Sequence[Tensor],
    *,
    attention_mask: Tensor | None = None,
    unconditional: Tensor | None = None,
    num_steps: int = 50,
    guidance_scale: float = 1.55,
    eta: float = 0.0,
    clip: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one picture for each prompt.

    Args:
        tower: The model.
        prompt: Ids int64 [batch, tokens], padded on the left; or parts of one row, text int64 [n] and clean latents
            [c, s, s] (a picture to be edited). The opening marker at its end may be left out.
        attention_mask: [batch, tokens], 0 at padding.
        unconditional: Ids int64 [n] in the prompt's place for guidance; None is the opening marker alone.
        num_steps: Steps; the number of training steps with ``eta=1`` is DDPM.
        guidance_scale: eps = eps_u + scale (eps_c - eps_u); at 1 the prompt alone is run.
        eta: Fresh noise in each step, as a share of that of DDPM.
        clip: Largest magnitude of latents in the predicted picture, such as 1 for pixels; None lets them be.
        generator: For the noise.

    Returns:
        Latents [batch, c, s, s], float32.

    Raises:
        ValueError: ``num_steps`` lies outside of the schedule, or prompts are padded on the right.
    """
    contexts = [_open(tower, prompt, attention_mask)]
    batch = contexts[0].hidden.shape[0]  # type: ignore[union-attr]
    if guidance_scale != 1:
        contexts.append(_open(tower, _empty(tower, unconditional, batch), None))
    return _draw(tower, contexts, batch, num_steps, guidance_scale, eta, clip, generator)


@torch.no_grad()
def generate(
    tower: ModalityTower,
    prompt: Tensor | Sequence[Tensor],
    *,
    max_new_tokens: int,
    allow_images: bool = True,
    eos_token_id: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    unconditional: Tensor | None = None,
    **drawing: Any,
) -> list[Tensor]:
    """Continue one row with text, and with a picture wherever the opening marker comes out.

    Args:
        tower: The model.
        prompt: Ids int64 [tokens] or [1, tokens], or parts as in `generate_image`.
        max_new_tokens: Most new text tokens, markers included.
        allow_images: Whether the opening marker may come out.
        eos_token_id: Token that ends the row; None takes that of the model's configuration.
        do_sample: Draw tokens instead of taking the likeliest.
        temperature: Of drawing.
        generator: For tokens and noise.
        unconditional: As in `generate_image`.
        drawing: ``num_steps``, ``guidance_scale``, ``eta`` and ``clip`` of `generate_image`.

    Returns:
        Parts: text int64 [n] without markers, and latents [c, s, s].
    """
    config = tower.config
    context = Context(tower)
    logits = _read(context, prompt)
    ends = eos_token_id if eos_token_id is not None else tower.model.generation_config.eos_token_id
    stop = {ends} if isinstance(ends, int) else set(ends or ())
    parts: list[Tensor] = []
    text: list[int] = []
    for _ in range(max_new_tokens):
        logits[:, config.eoi_token_id] = -torch.inf
        if not allow_images:
            logits[:, config.boi_token_id] = -torch.inf
        token = _sample(logits, do_sample, temperature, generator)
        if token == config.boi_token_id:
            parts += [torch.tensor(text)] if text else []
            text = []
            here = torch.tensor([[token]], device=logits.device)
            context.read_text(here)
            contexts = [context]
            settings = {"num_steps": 50, "guidance_scale": 1.55, "eta": 0.0, "clip": None, **drawing}
            if settings["guidance_scale"] != 1:
                contexts.append(_open(tower, _empty(tower, unconditional, 1), None))
            made = _draw(tower, contexts, 1, generator=generator, **settings)
            parts.append(made[0])
            context.write_picture(made)
            logits = context.read_text(torch.full_like(here, config.eoi_token_id))
            continue
        text.append(token)
        if token in stop:
            break
        logits = context.read_text(torch.tensor([[token]], device=logits.device))
    return [*parts, torch.tensor(text)] if text else parts


def _draw(
    tower: ModalityTower,
    contexts: list[Context],
    batch: int,
    num_steps: int,
    guidance_scale: float,
    eta: float,
    clip: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    steps = tower.config.num_train_timesteps
    times = sampling_times(num_steps, steps).tolist()
    place = tower.marker_in.device

    def normal() -> Tensor:
        source = generator.device if generator else "cpu"
        return torch.randn(batch, *tower.config.latent_shape, generator=generator, device=source).to(place)

    z = normal()
    for now, then in zip(times, [*times[1:], -1], strict=True):
        t = torch.full((batch,), now, device=place)
        eps = [context.predict(z, t).float() for context in contexts]
        mixed = eps[0] if len(eps) == 1 else eps[1] + guidance_scale * (eps[0] - eps[1])
        fresh = normal() if eta > 0 else None
        z = ddim_step(z, mixed, t, torch.full_like(t, then), steps=steps, eta=eta, noise=fresh, clip=clip)
    return z


def _open(tower: ModalityTower, prompt: Tensor | Sequence[Tensor], mask: Tensor | None) -> Context:
    """A context that ends in the opening marker."""
    boi = tower.config.boi_token_id
    if isinstance(prompt, Tensor):
        prompt = prompt if prompt.dim() == 2 else prompt[None]
        if prompt.shape[1] and bool((prompt[:, -1] == boi).all()):
            prompt, mask = prompt[:, :-1], None if mask is None else mask[:, :-1]
        batch = len(prompt)
        context = Context(tower, mask)
        if prompt.shape[1]:
            context.read_text(prompt.to(tower.marker_in.device))
    else:
        batch, context = 1, Context(tower, mask)
        _read(context, prompt)
    # By itself: the text before it is read just as the model without a tower reads it.
    context.read_text(torch.full((batch, 1), boi, device=tower.marker_in.device))
    return context


def _read(context: Context, prompt: Tensor | Sequence[Tensor]) -> Tensor:
    parts = [prompt.flatten()] if isinstance(prompt, Tensor) else list(prompt)
    if not parts:
        raise ValueError("the prompt is empty; give at least one token or picture")
    logits = None
    place = context.tower.marker_in.device
    for part in parts:
        if part.is_floating_point():
            context.read_picture(part[None].to(place))
            assert context.hidden is not None
            logits = context.tower.logits_of(context.hidden[:, -1:])[:, 0]
        else:
            logits = context.read_text(part[None].to(place))
    assert logits is not None
    return logits


def _empty(tower: ModalityTower, unconditional: Tensor | None, batch: int) -> Tensor:
    if unconditional is None:
        return torch.empty(batch, 0, dtype=torch.long)
    return unconditional.flatten().expand(batch, -1)


def _sample(logits: Tensor, do_sample: bool, temperature: float, generator: torch.Generator | None) -> int:
    if not do_sample:
        return int(logits.argmax(-1))
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}; use a number above 0, or do_sample=False")
    chances = (logits.float() / temperature).softmax(-1).cpu()
    return int(torch.multinomial(chances, 1, generator=generator))
