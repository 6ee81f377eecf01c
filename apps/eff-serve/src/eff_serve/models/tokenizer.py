"""Text to token ids and back, and chat messages to text, without importing transformers (which costs ten seconds)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from eff_serve.models.chat_template import ChatTemplate, ChatTemplateError
from eff_serve.models.dialects import dialect_of
from eff_serve.models.files import read_json
from eff_serve.models.special_tokens import SpecialTokenGuard
from eff_serve.models.tool_messages import arranged

__all__ = ["ChatTemplateError", "IncrementalDecoder", "Tokenizer"]


class Tokenizer:
    """Tokenizer of a transformers folder (tokenizer.json, tokenizer_config.json, chat_template.jinja).

    Args:
        folder: The model's folder.
        picture: Token ids that keep a picture's place; empty for a model without eyes.

    Attributes:
        dialect: How the model writes calls of functions.
        thinks: Whether its template knows thoughts between ``<think>`` tags.

    Raises:
        FileNotFoundError: the folder has no tokenizer.json.
        ValueError: a file is damaged.
    """

    def __init__(self, folder: Path, picture: Sequence[int] = ()) -> None:
        self._picture = list(picture)
        self._path = path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json; save the model's fast tokenizer there")
        try:
            self.backend = Backend.from_file(str(path))
        except Exception as error:  # tokenizers raises the bare class
            raise ValueError(f"{path} is not a tokenizer: {error}") from error
        self.backend.no_padding()
        self.backend.no_truncation()
        self._config = read_json(folder / "tokenizer_config.json")
        special = {name: _content(v) or "" for name, v in self._config.items() if name.endswith("_token")}
        source = _chat_template(folder, self._config)
        self.dialect = dialect_of(source)
        self.thinks = "<think>" in (source or "")
        self._template = None if source is None else ChatTemplate(source, {"bos_token": "", "eos_token": "", **special})
        self.bos_token = _content(self._config.get("bos_token"))
        self.eos_token = _content(self._config.get("eos_token"))

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; special tokens written in the text count as such."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that form no whole character become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def marker(self, text: str) -> tuple[int, bool] | None:
        """Id of the token that a text is by itself, and whether it is a special one; None for ordinary text."""
        token = self.backend.token_to_id(text)
        if token is None or token not in self.added_tokens:
            return None
        return token, self.added_tokens[token].special

    def token_text(self, token: int) -> str:
        """A single token as text."""
        return self.decode([token], skip_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """Lay out messages as the model was trained to read them; arguments as for `ChatTemplate.render`.

        Raises:
            ChatTemplateError: there is no template, or it refuses the messages or the arguments.
        """
        return self._existing_template.render(messages, **kwargs)

    @property
    def _existing_template(self) -> ChatTemplate:
        if self._template is None:
            raise ChatTemplateError("this model has no chat template; use the completions endpoint, or generate --raw")
        return self._template

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_special_tokens: bool = False,
        more: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a conversation; arguments as for `ChatTemplate.render`.

        Functions, their calls and results are laid out whether or not the template has a place for them (see
        `eff_serve.models.tool_messages`).

        Only the template writes special tokens. Where a message spells one, it is read as plain text, so that nobody
        can end their turn and open one of the system inside their own.

        A message with ``pictures`` has room for so many in front of its text.

        Raises:
            ChatTemplateError: as for `render_chat`; or there are pictures and the model has no eyes.
        """
        if not self._picture and any(m.get("pictures") for m in messages):
            raise ChatTemplateError("this model reads text only, and a message holds a picture")
        guard = SpecialTokenGuard(self.special_tokens)
        template = self._existing_template
        turns, extra = arranged(guard.hide(messages), guard.hide_value(tools), template, self.dialect)
        given = extra.pop("tools", None)
        text = template.render(turns, tools=given, more={**extra, **(more or {})}, **kwargs)
        ids: list[int] = []
        for piece, kind in guard.pieces(text):
            if kind == "picture":
                ids += self._picture
            elif kind == "plain":
                ids += self._plain.encode(piece, add_special_tokens=False).ids
            else:
                ids += self.encode(piece, add_special_tokens=add_special_tokens and not ids)
        return ids

    @functools.cached_property
    def added_tokens(self) -> dict[int, AddedToken]:
        """Tokens that were added to the vocabulary, special or not, by id; some families have a thousand."""
        return self.backend.get_added_tokens_decoder()

    @functools.cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The texts that stand for special tokens."""
        return tuple(t.content for t in self.added_tokens.values() if t.special)

    @functools.cached_property
    def _plain(self) -> Backend:
        """A second backend, which reads special tokens as text; made when a message spells one."""
        backend = Backend.from_file(str(self._path))
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        return backend


class IncrementalDecoder:
    """Turns a stream of token ids into text that only ever grows by whole characters."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._shown = 0  # ids whose text is out; a few are kept, since a decoder may look at the token before
        self._context = 0

    def push(self, token: int) -> str:
        """Text that this token completes; empty while a character is incomplete."""
        self._ids.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        """What is left at the end, with U+FFFD for a character that was never completed."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._shown], self._skip)
        after = self._tokenizer.decode(self._ids[self._context :], self._skip)
        if not final and (len(after) <= len(before) or after.endswith("\ufffd")) and len(self._ids) - self._shown < 16:
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return after[len(before) :]


def _content(token: Any) -> str | None:
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    return template
