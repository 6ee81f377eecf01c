"""Pictures: send, fetch, read the settings inside."""

from __future__ import annotations

from typing import Any

from eff_http import ApiError, bad_request
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from eff_studio.api.studio import read_bytes, studio_of
from eff_studio.store import Rejected, read_settings
from eff_studio.work import read_work

router = APIRouter(prefix="/api", tags=["pictures"])
_HEADERS = {"cache-control": "private, max-age=31536000, immutable", "content-disposition": "inline"}


@router.post("/pictures", status_code=201)
async def send(request: Request) -> dict[str, str]:
    """Store a PNG, JPEG or WebP picture, the whole body; its id is for jobs."""
    studio = studio_of(request)
    return {"id": studio.take_picture(await read_bytes(request, studio.settings.max_upload_bytes))}


@router.get("/pictures/{name}.png")
async def fetch(name: str, request: Request) -> Response:
    """A stored picture."""
    path = studio_of(request).pictures.path(name)
    if path is None:
        raise ApiError(404, f"there is no picture {name[:64]!r}", code="picture_not_found")
    return FileResponse(path, media_type="image/png", headers=_HEADERS)


@router.post("/settings")
async def settings(request: Request) -> dict[str, Any]:
    """The settings inside of a picture of the studio, the whole body, checked: kind and settings."""
    studio = studio_of(request)
    try:
        found = read_settings(await read_bytes(request, studio.settings.max_upload_bytes))
        work = read_work(str(found.get("kind")), found["settings"])
    except Rejected as error:
        raise bad_request(str(error)) from None
    except (ValueError, TypeError) as error:
        raise bad_request(f"the picture's settings do not fit this studio: {error}") from None
    return {"kind": found["kind"], "settings": work.to_dict()}
