"""CARVE in front of a chat: where the question looks more than a general request does is cut out and shown again.

Two short answers are generated before the one that the client reads, to a general request about the picture and to the
conversation itself. They run in the engine's batch like all others. What the general one looks at is kept by picture,
so that further questions about it wait for one answer alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from eff_http import bad_request

from eff_serve.api import pictures
from eff_serve.api.generation import deadline_passed, in_line, told_of_end
from eff_serve.api.schema.chat import ChatRequest, ImagePart, Message, TextPart
from eff_serve.api.serving import Serving
from eff_serve.engine.steering import CARVE, not_taken
from eff_serve.engine.types import Sampling
from eff_serve.engine.watch import PictureWatch

if TYPE_CHECKING:
    from eff_attention.contrastive_focus import CarveConfig
    from PIL.Image import Image
    from torch import Tensor

Encode = Callable[[ChatRequest], list[int]]


def check(body: ChatRequest, serving: Serving) -> CarveConfig | None:
    """The settings where a chat asks for a second look.

    Raises:
        ApiError: 400 where the model takes none, or the conversation does not hold one picture and a question about it.
    """
    config = None if body.eff is None else body.eff.second_look
    if config is None:
        return None
    if CARVE not in serving.steering:
        raise bad_request(not_taken(CARVE, serving.steering), "eff.carve")
    if (count := len(pictures.placed(body.messages))) != 1:
        raise bad_request(f"eff.carve looks twice at one picture, and the conversation has {count}", "eff.carve")
    last = body.messages[-1]
    if last.role != "user" or not _has_text(last):
        raise bad_request("eff.carve needs a question of the user as the last message", "messages")
    return config


def shown_again(body: ChatRequest, config: CarveConfig) -> ChatRequest:
    """The conversation of the last answer: with the suffix, and with room for both pictures where both are shown."""
    copies = 2 if config.final == "both" else 1
    messages = [_with_pictures(m, copies) for m in body.messages]
    messages[-1] = _asking(messages[-1], config.suffix)
    return body.model_copy(update={"messages": messages})


async def look(
    body: ChatRequest, encode: Encode, serving: Serving, config: CarveConfig, prompt: Sequence[int], sampling: Sampling
) -> Any:
    """Find the part of the picture that matters, and make what the engine takes for the last answer.

    Args:
        body: The conversation as it came.
        encode: Makes a prompt of a conversation.
        serving: Engine and eyes.
        config: Settings.
        prompt: The prompt of `shown_again`.
        sampling: Of the last answer; its adapter and priority hold for the others too.

    Raises:
        ApiError: 400 for a bad picture or prompts that do not fit, 429, 503, or 504 past the deadline.
    """
    from eff_attention.contrastive_focus import contrast_attention

    eyes = serving.eyes
    assert eyes is not None
    (picture,) = await asyncio.to_thread(pictures.read, body.messages)
    plain = Sampling(
        max_tokens=config.max_new_tokens, temperature=0.0, adapter=sampling.adapter, priority=sampling.priority
    )

    async def record(asked: ChatRequest) -> Tensor:
        ids = await asyncio.to_thread(encode, asked)
        seen = await asyncio.to_thread(eyes.look, ids, [picture])
        return await watched(serving, ids, plain, seen, config)

    about = body.model_copy(update={"messages": _general(body.messages, config)})
    system = tuple((m.role, str(m.content)) for m in about.messages[:-1])
    pixels = await asyncio.to_thread(_fingerprint, picture)
    key = (pixels, config.general, config.suffix, config.max_new_tokens, config.layers, system, sampling.adapter)
    asking = body.model_copy(update={"messages": [*body.messages[:-1], _asking(body.messages[-1], config.suffix)]})
    seconds = serving.settings.deadline
    try:
        async with asyncio.timeout(seconds):
            general, own = await asyncio.gather(
                serving.general_requests.answer(key, lambda: record(about)), record(asking)
            )
    except TimeoutError:
        raise deadline_passed(seconds) from None
    refined = await asyncio.to_thread(_refined, picture, contrast_attention(own, general, config.lam), config)
    shown = [refined] if config.final == "refined" else [picture, refined]
    return await asyncio.to_thread(eyes.look, prompt, shown)


async def watched(serving: Serving, prompt: list[int], sampling: Sampling, seen: Any, config: CarveConfig) -> Tensor:
    """Generate an answer that nobody reads; where it looked, float32 [T, layers, N]."""
    watch = PictureWatch(config.layers)
    with in_line(serving):
        stream = serving.engine.submit(prompt, replace(sampling, watch=watch), seen)
    try:
        async for step in stream:
            told_of_end(step)
    finally:
        stream.cancel()
    return watch.maps


def _refined(picture: Image, contrast: Tensor, config: CarveConfig) -> Image:
    from eff_attention.contrastive_focus import attention_regions, fuse_attention, mask_crop_resize

    side = math.isqrt(contrast.shape[-1])  # eyes squeeze every picture to a square
    score = fuse_attention(contrast, (side, side), (picture.height, picture.width), time=config.time)
    mask = attention_regions(score, config.top_p, config.max_regions, rank=config.rank)
    outside, ratio = config.outside == "kept", config.ratio == "picture"
    refined: Image = mask_crop_resize(picture, mask, keep_outside=outside, keep_ratio=ratio)[0]
    return refined


def _fingerprint(picture: Image) -> bytes:
    return hashlib.sha256(repr((picture.size, picture.mode)).encode() + picture.tobytes()).digest()


def _general(messages: Sequence[Message], config: CarveConfig) -> list[Message]:
    """The general request about the conversation's picture, behind the same words of the system."""
    first = [m for m in messages if m.role in ("system", "developer")]
    part = pictures.placed(messages)[0][1]
    request = Message(role="user", content=[part, TextPart(type="text", text=config.general + config.suffix)])
    return [*first, request]


def _with_pictures(message: Message, copies: int) -> Message:
    if copies == 1 or not isinstance(message.content, list):
        return message
    parts = [part for p in message.content for part in ([p] * copies if isinstance(p, ImagePart) else [p])]
    return message.model_copy(update={"content": parts})


def _has_text(message: Message) -> bool:
    content = message.content or ""
    return bool(content if isinstance(content, str) else any(isinstance(p, TextPart) for p in content))


def _asking(message: Message, suffix: str) -> Message:
    """A message with a suffix behind the last of its text."""
    if isinstance(message.content, str):
        return message.model_copy(update={"content": message.content + suffix})
    assert message.content is not None
    parts = list(message.content)
    last = max(i for i, part in enumerate(parts) if isinstance(part, TextPart))
    part = parts[last]
    assert isinstance(part, TextPart)
    parts[last] = part.model_copy(update={"text": part.text + suffix})
    return message.model_copy(update={"content": parts})
