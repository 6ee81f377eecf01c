"""What the HTTP layer can be told: names, keys, limits."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the HTTP layer.

    Attributes:
        model_id: Name of the model in requests and responses.
        aliases: Other names that requests may use for it.
        fingerprint: Sent as ``system_fingerprint``; changes when results may change (version, weights format).
        created: Time at which the model was loaded, in seconds since 1970.
        api_keys: Keys that clients may use; empty means that no key is asked for.
        protect_metrics: Ask for a key at /metrics too.
        hosts: Names that the Host header may have; None takes any. For a server on the loopback address without keys,
            whose pages in a browser could otherwise reach it under a name of their own.
        cors_origins: Origins that browsers may call from; empty switches CORS off.
        max_body_bytes: Longest request body.
        body_timeout: Seconds within which a request's body must arrive.
        max_json_depth: Deepest nesting of a request body, JSON schemas included.
        max_sequences: Most sequences of one request: prompts times ``n``.
        deadline: Seconds after which a request is given up.
        chat_page: Serve the chat page at ``/``.
        family: Architecture of the model, such as "llama"; told by Ollama's API and the chat page, like the next two.
        quantization: Format of its weights.
        weight_bytes: Their size.
        adapter_root: Folder inside of which clients may name adapters to load; None: they may load none.
    """

    model_id: str
    aliases: tuple[str, ...] = ()
    fingerprint: str = "eff"
    created: int = field(default_factory=lambda: int(time.time()))
    api_keys: tuple[str, ...] = ()
    protect_metrics: bool = False
    hosts: tuple[str, ...] | None = None
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20
    body_timeout: float = 30.0
    max_json_depth: int = 64
    max_sequences: int = 64
    deadline: float = 600.0
    chat_page: bool = True
    family: str = "unknown"
    quantization: str = ""
    weight_bytes: int = 0
    adapter_root: Path | None = None

    def __post_init__(self) -> None:
        for name in ("max_sequences", "deadline"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
