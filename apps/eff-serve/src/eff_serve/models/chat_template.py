"""Chat templates: the jinja text that comes with a model turns messages into the prompt it was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_END_OF_LAST_MESSAGE = "\x02end of the message to continue\x03"


class ChatTemplateError(ValueError):
    """The model's chat template refuses these messages, or cannot express what was asked for."""


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}`` marks the assistant's part for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it as a set

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: The jinja text.
        special_tokens: Names that the template may use, such as ``bos_token``.

    Raises:
        ChatTemplateError: the text is not valid jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._names = jinja2.meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as e:
            raise ChatTemplateError(
                f"the model's chat template is not valid jinja, line {e.lineno}: {e.message}"
            ) from e
        self._special_tokens = dict(special_tokens)
        self.source = source

    @property
    def takes_tools(self) -> bool:
        """Whether the template has a place for tools."""
        return "tools" in self._names

    @property
    def takes_xml_tools(self) -> bool:
        """Whether it has one under the name that SmolLM3 gives it."""
        return "xml_tools" in self._names

    @property
    def takes_calls(self) -> bool:
        """Whether it writes the ``tool_calls`` of a message."""
        return "tool_calls" in self.source

    @property
    def takes_results(self) -> bool:
        """Whether it knows messages of role "tool"."""
        return "'tool'" in self.source or '"tool"' in self.source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> str:
        """Turn messages into a prompt.

        Args:
            messages: Each with ``role`` and ``content``, oldest first.
            add_generation_prompt: End with what opens the assistant's answer.
            continue_final_message: End inside the last message, so that the model goes on with it.
            tools: JSON descriptions of functions.
            more: More names for the template (``chat_template_kwargs``); they may not hide the names above.

        Raises:
            ChatTemplateError: the template raised, has no place for ``tools``, or drops the message to continue.
        """
        if tools and not self.takes_tools:
            raise ChatTemplateError("the model's chat template has no place for tools; send the request without tools")
        if taken := {"messages", "tools", "add_generation_prompt"} & (more or {}).keys():
            raise ChatTemplateError(f"chat template arguments must not contain {sorted(taken)}")
        if continue_final_message:
            if add_generation_prompt:
                raise ChatTemplateError("add_generation_prompt and continue_final_message exclude each other")
            messages = _mark_end(messages)
        try:
            # One mapping: as keyword arguments, a name such as "self" would be taken for one of jinja's own.
            text = self._template.render(
                {
                    **self._special_tokens,
                    **(more or {}),
                    "messages": [dict(m) for m in messages],
                    "tools": list(tools) if tools else None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as e:
            raise ChatTemplateError(f"the model's chat template refused the messages: {e}") from e
        if not continue_final_message:
            return text
        head, marker, _ = text.rpartition(_END_OF_LAST_MESSAGE)
        if not marker:
            raise ChatTemplateError("the model's chat template drops the last message, so it cannot be continued")
        return head


def _mark_end(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if not messages or not isinstance(messages[-1].get("content"), str):
        raise ChatTemplateError("continue_final_message needs a last message whose content is text")
    last = {**messages[-1], "content": messages[-1]["content"] + _END_OF_LAST_MESSAGE}
    return [*messages[:-1], last]
