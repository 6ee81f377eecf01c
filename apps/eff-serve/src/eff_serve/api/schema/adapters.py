"""Bodies of /v1/load_lora_adapter and /v1/unload_lora_adapter."""

from __future__ import annotations

from typing import Annotated

from eff_http import RequestModel
from pydantic import BaseModel, Field

AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._\-]{0,63}$")]


class LoadAdapterRequest(RequestModel):
    """Body of POST /v1/load_lora_adapter.

    ``lora_path`` is a folder inside of the server's ``--adapter-root``; ``load_inplace`` puts it in the place of an
    adapter of that name, which requests that run keep.
    """

    lora_name: AdapterName
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadAdapterRequest(RequestModel):
    """Body of POST /v1/unload_lora_adapter."""

    lora_name: AdapterName


class AdapterResponse(BaseModel):
    """What is served under the name, or was."""

    id: str
    status: str
