"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: adapters that come and go while the server runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from eff_http import ApiError, JsonRoute, bad_request
from fastapi import APIRouter, Request

from eff_serve.api.documented import errors
from eff_serve.api.schema.adapters import AdapterResponse, LoadAdapterRequest, UnloadAdapterRequest
from eff_serve.api.serving import Serving

router = APIRouter(route_class=JsonRoute, tags=["adapters"])


@router.post("/v1/load_lora_adapter", responses=errors(400, 401, 404, 413, 503))
async def load(body: LoadAdapterRequest, request: Request) -> AdapterResponse:
    """Offer an adapter, or a mixture of them, as ``model:name``. With an error nothing has changed."""
    serving: Serving = request.app.state.serving
    serving.check()
    folder = _inside(serving.settings.adapter_root, body.lora_path)
    if body.lora_name in serving.adapters and not body.load_inplace:
        raise bad_request(
            f"there is an adapter {body.lora_name!r} already; unload it first, or set load_inplace", "lora_name"
        )
    engine: Any = serving.engine
    try:
        await asyncio.to_thread(engine.load_adapter, body.lora_name, folder, replace=body.load_inplace)
    except FileNotFoundError as error:
        raise ApiError(404, _shown(error, serving), param="lora_path", code="adapter_not_found") from error
    except (ValueError, TypeError) as error:
        raise bad_request(_shown(error, serving), "lora_path") from error
    return AdapterResponse(id=serving.name_of(body.lora_name), status="loaded")


@router.post("/v1/unload_lora_adapter", responses=errors(400, 401, 404, 413, 503))
async def unload(body: UnloadAdapterRequest, request: Request) -> AdapterResponse:
    """Offer an adapter no longer. Requests that have it end with it."""
    serving: Serving = request.app.state.serving
    serving.check()
    engine: Any = serving.engine
    if body.lora_name not in serving.adapters:
        raise ApiError(
            404, f"there is no adapter {body.lora_name!r}; there are {list(serving.adapters)}",
            param="lora_name", code="adapter_not_found",
        )  # fmt: skip
    await asyncio.to_thread(engine.unload_adapter, body.lora_name)
    return AdapterResponse(id=serving.name_of(body.lora_name), status="unloaded")


def _inside(root: Path | None, path: str) -> Path:
    """The folder that a client names, which must lie inside of the root, links followed."""
    if root is None:
        raise bad_request("this server loads no adapters while it runs; start it with --adapter-root", "lora_path")
    home = root.resolve()
    try:
        folder = (home / path).resolve()
    except (OSError, ValueError) as error:  # a zero byte, a loop of links
        raise bad_request("lora_path is not a path", "lora_path") from error
    if home not in folder.parents:
        raise bad_request("lora_path must be a folder inside of the server's adapter root", "lora_path")
    return folder


def _shown(error: Exception, serving: Serving) -> str:
    """The reason, without where the root lies on the server's disk."""
    return str(error).replace(f"{Path(serving.settings.adapter_root or '').resolve()}/", "")
