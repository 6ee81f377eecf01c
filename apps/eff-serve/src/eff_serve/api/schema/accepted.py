"""Fields that ask for nothing here: notes for the caller's own use, and defaults of other servers spelt out.

Clients send them without being asked. Each is taken where ignoring it cannot change the answer, and refused otherwise.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from eff_http import RequestModel, refuse
from pydantic import Field, field_validator

Note = Annotated[str, Field(max_length=512)]
_ASKS_FOR_NOTHING: dict[str, tuple[object, ...]] = {
    "store": (None, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "prediction": (None,),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "web_search_options": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "service_tier": (None, "auto", "default"),
}


class AcceptedFields(RequestModel):
    """Base of the bodies of generation."""

    metadata: Annotated[dict[Note, Note], Field(max_length=16)] | None = None
    safety_identifier: Note | None = None
    prompt_cache_key: Note | None = None
    prompt_cache_retention: Literal["in-memory", "in_memory", "24h"] | None = None
    store: Any = None
    functions: Any = None
    function_call: Any = None
    prediction: Any = None
    audio: Any = None
    modalities: Any = None
    web_search_options: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    service_tier: Any = None

    @field_validator(*_ASKS_FOR_NOTHING)
    @classmethod
    def _nothing(cls, value: Any, info: Any) -> Any:
        wanted = _ASKS_FOR_NOTHING[info.field_name]
        if not any(value == w and type(value) is type(w) for w in wanted):
            known = ", ".join("null" if w is None else repr(w) for w in wanted)
            raise refuse(f"{info.field_name}={str(value)[:60]!r} is not supported; leave it out, or send {known}")
        return value
