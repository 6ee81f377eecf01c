"""Answers in the terminal: one, or a conversation."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from eff_serve.engine.types import Sampling
from eff_serve.models.tokenizer import IncrementalDecoder

if TYPE_CHECKING:
    from eff_serve.engine import LoadedModel


def generate(loaded: LoadedModel, prompt: str, max_tokens: int, temperature: float, *, raw: bool) -> int:
    """Print the answer to one prompt as it comes. Returns the exit status."""
    loaded.engine.start()
    text = prompt if raw else loaded.tokenizer.render_chat([{"role": "user", "content": prompt}])
    try:
        asyncio.run(_answer(loaded, text, max_tokens, temperature))
    except ValueError as error:
        sys.exit(f"eff-serve: {error}")
    finally:
        loaded.engine.stop(0)
    return 0


def chat(loaded: LoadedModel, system: str | None, max_tokens: int, temperature: float) -> int:
    """Read messages and answer them until /quit or the end of input. Returns the exit status."""
    from rich.console import Console

    console = Console()
    console.print(f"{loaded.description}. /reset starts anew, /quit leaves, Ctrl-C stops an answer.", highlight=False)
    loaded.engine.start()
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    try:
        while (line := console.input("[bold]> [/bold]")) != "/quit":
            if line == "/reset":
                messages = list(start)
                continue
            messages.append({"role": "user", "content": line})
            try:
                text = asyncio.run(_answer(loaded, loaded.tokenizer.render_chat(messages), max_tokens, temperature))
            except KeyboardInterrupt:
                console.print("\n(stopped)")
                text = ""
            except ValueError as error:
                console.print(f"eff-serve: {error}", style="red", markup=False)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": text})
    except (EOFError, KeyboardInterrupt):
        console.print()
    finally:
        loaded.engine.stop(0)
    return 0


async def _answer(loaded: LoadedModel, text: str, max_tokens: int, temperature: float) -> str:
    prompt = loaded.tokenizer.encode(text)
    room = loaded.engine.max_model_len - len(prompt)
    stream = loaded.engine.submit(prompt, Sampling(max_tokens=max(1, min(max_tokens, room)), temperature=temperature))
    decoder = IncrementalDecoder(loaded.tokenizer)
    answer = ""
    try:
        async for step in stream:
            if step.error is not None:
                raise RuntimeError(step.error)
            piece = decoder.push(step.token) if step.token is not None else ""
            if step.finish_reason is not None:
                piece += decoder.flush()
            answer += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:
        stream.cancel()
    sys.stdout.write("\n")
    return answer
