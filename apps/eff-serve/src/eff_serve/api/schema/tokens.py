"""Bodies of /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated

from eff_http import RequestModel, refuse
from pydantic import BaseModel, Field, model_validator

from eff_serve.api.schema.chat import Messages, TemplateFields, refuse_strange_results
from eff_serve.api.schema.common import Token
from eff_serve.api.schema.tools import MAX_TOOLS, Tool


class TokenizeRequest(TemplateFields):
    """Body of POST /tokenize: a text or messages, and what to do with them.

    ``add_special_tokens`` adds the tokens that the tokenizer puts around a text; by default for a prompt, not for
    messages, whose template writes them itself.
    """

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one_input(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise refuse("give exactly one of prompt and messages", "prompt")
        for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools"):
            if self.messages is None and getattr(self, name):
                raise refuse(f"{name} needs messages", name)
        refuse_strange_results(self.messages or [])
        return self


class TokenizeResponse(BaseModel):
    """Token ids of the input."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestModel):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[Token], Field(max_length=2**20)]


class DetokenizeResponse(BaseModel):
    """Text of the tokens."""

    prompt: str
