"""Answers in the terminal: one, or a conversation."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from eff_serve.engine.types import Sampling
from eff_serve.models.tokenizer import IncrementalDecoder

if TYPE_CHECKING:
    from rich.console import Console

    from eff_serve.engine import LoadedModel


Messages: TypeAlias = "list[dict[str, str]]"
HELP = "/reset starts over, /system TEXT too, /save FILE keeps the talk, /quit leaves, Ctrl-C stops an answer."


def generate(loaded: LoadedModel, prompt: str, max_tokens: int, temperature: float, *, raw: bool) -> int:
    """Print the answer to one prompt as it comes. Returns the exit status."""
    loaded.engine.start()
    tokenizer = loaded.tokenizer
    try:
        ids = tokenizer.encode(prompt) if raw else tokenizer.encode_chat([{"role": "user", "content": prompt}])
        asyncio.run(_answer(loaded, ids, max_tokens, temperature))
    except ValueError as error:
        sys.exit(f"eff-serve: {error}")
    finally:
        loaded.engine.stop(0)
    return 0


def chat(loaded: LoadedModel, system: str | None, max_tokens: int, temperature: float) -> int:
    """Read messages and answer them until /quit or the end of input. Returns the exit status."""
    from rich.console import Console

    console = Console()
    console.print(f"{loaded.description}. {HELP}", highlight=False)
    loaded.engine.start()
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    try:
        while (line := console.input("[bold]> [/bold]")) != "/quit":
            if line.startswith("/"):
                start, messages = _command(line, start, messages, console)
                continue
            messages.append({"role": "user", "content": line})
            try:
                text = asyncio.run(_answer(loaded, loaded.tokenizer.encode_chat(messages), max_tokens, temperature))
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


def _command(line: str, start: Messages, messages: Messages, console: Console) -> tuple[Messages, Messages]:
    """Do what a line with a slash asks for: the first message of every talk, and the talk so far."""
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word == "/reset" and not rest:
        return start, list(start)
    if word == "/system":
        start = [{"role": "system", "content": rest}] if rest else []
        return start, list(start)
    if word == "/save" and rest:
        try:
            Path(rest).expanduser().write_text(json.dumps(messages, indent=2, ensure_ascii=False) + "\n", "utf-8")
        except OSError as error:
            console.print(f"eff-serve: {error}", style="red", markup=False)
    else:
        console.print(HELP, highlight=False)
    return start, messages


async def _answer(loaded: LoadedModel, prompt: list[int], max_tokens: int, temperature: float) -> str:
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
