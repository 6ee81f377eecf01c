"""Settings of the server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Who may come in and how much they may ask for.

    Attributes:
        api_keys: Keys; none asks for none.
        hosts: Names that requests may give the server; None takes any.
        max_waiting: Most jobs in line; more are answered with 429.
        max_upload_bytes: Largest picture that is taken.
        max_json_bytes: Largest JSON body.
        page: Whether the web page is served.
    """

    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    max_waiting: int = 64
    max_upload_bytes: int = 20 * 2**20
    max_json_bytes: int = 2**20
    page: bool = True
