"""From the picture parts of a request to what the engine takes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from eff_http import bad_request

from eff_serve.api.schema.chat import ImagePart, Message

MAX_PICTURES = 8


class Eyes(Protocol):
    """What a model sees with; see `eff_serve.pictures.Eyes`."""

    def look(self, prompt: Sequence[int], pictures: Sequence[Any]) -> Any:
        """What the engine wants to know of the pictures of a prompt."""
        ...


def placed(messages: Sequence[Message]) -> list[tuple[str, ImagePart]]:
    """The picture parts of a conversation, each with its path in the request."""
    return [
        (f"messages[{i}].content[{j}]", part)
        for i, message in enumerate(messages)
        if isinstance(message.content, list)
        for j, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]


def check(messages: Sequence[Message], eyes: Eyes | None) -> None:
    """Refuse pictures where the model has no eyes, outside users' messages, or too many of them.

    Raises:
        ApiError: 400.
    """
    found = placed(messages)
    if not found:
        return
    path = found[0][0]
    if eyes is None:
        raise bad_request(
            "content parts of type 'image_url' are not supported: this model reads text only; use 'text' parts",
            f"{path}.type",
        )
    if len(found) > MAX_PICTURES:
        raise bad_request(f"the conversation holds {len(found)} pictures; the limit is {MAX_PICTURES}", "messages")
    for path, _ in found:
        role = messages[int(path[len("messages[") : path.index("]")])].role
        if role != "user":
            raise bad_request(f"pictures are only for messages of the user, got role {role!r}", f"{path}.type")


async def look(messages: Sequence[Message], prompt: Sequence[int], eyes: Eyes | None) -> Any:
    """What the engine takes for the pictures of a conversation, or None where it has none.

    Raises:
        ApiError: 400 for what is no picture, with the path of the part.
    """
    found = placed(messages)
    if not found or eyes is None:
        return None
    return await asyncio.to_thread(lambda: eyes.look(prompt, read(messages)))


def read(messages: Sequence[Message]) -> list[Any]:
    """The pictures of a conversation, decoded.

    Raises:
        ApiError: 400 for what is no picture, with the path of the part.
    """
    from eff_serve.pictures import PictureError, read_picture

    pictures = []
    for path, part in placed(messages):
        try:
            pictures.append(read_picture(part.image_url.url))
        except PictureError as error:
            raise bad_request(str(error), f"{path}.image_url.url") from None
    return pictures
