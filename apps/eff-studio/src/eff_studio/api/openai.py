"""OpenAI's image endpoints, so that its clients work."""

from __future__ import annotations

import base64
import time
from typing import Annotated, Any, Literal

from eff_http import (
    ApiError,
    ClientGoneError,
    JsonRoute,
    RequestModel,
    bad_request,
    internal_error,
    unless_disconnected,
)
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import Field
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException

from eff_studio.api.studio import Studio, read_bytes, studio_of
from eff_studio.store import Job
from eff_studio.work import MAX_COUNT, Work
from eff_studio.worker import UNEXPECTED

router = APIRouter(prefix="/v1", route_class=JsonRoute, tags=["openai"])
uploads = APIRouter(prefix="/v1", tags=["openai"])


class Generation(RequestModel):
    """OpenAI's request for pictures, with ours under ``eff``: any setting of the kind "generate"."""

    prompt: str
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    quality: str | None = None
    moderation: str | None = None
    style: str | None = None
    stream: Literal[False] | None = None
    user: str | None = None
    eff: dict[str, Any] | None = None


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The model that draws."""
    card = {"id": studio_of(request).worker.model.name, "object": "model", "created": 0, "owned_by": "eff"}
    return {"object": "list", "data": [card]}


@router.post("/images/generations")
async def generations(body: Generation, request: Request) -> Response:
    """Draw pictures and wait for them."""
    studio = studio_of(request)
    _check_model(studio, body.model)
    values = dict(body.eff or {})
    if taken := sorted({"prompt", "count"} & set(values)):
        raise bad_request(f"eff has {taken}; prompt and n say that", "eff")
    values |= {"prompt": body.prompt, "count": body.n or 1, **_size(body.size)}
    return await _answer(request, studio, studio.work("generate", values), body.response_format)


@uploads.post("/images/edits")
async def edits(request: Request) -> Response:
    """Paint the subject (the second picture) into the hole of the first one: where the mask is transparent."""
    studio = studio_of(request)
    form = await _form(request, studio)
    images = form.pop("image", []) + form.pop("image[]", [])
    masks = form.pop("mask", [])
    if len(images) != 2 or len(masks) != 1:
        raise bad_request(
            f"{len(images)} images and {len(masks)} masks; wanted the picture, then that of the subject, and one mask",
            "image",
        )
    texts = {name: values[-1] for name, values in form.items()}
    known = {"prompt", "model", "n", "size", "response_format", "seed", "steps", "guidance", "strength", "user"}
    if unknown := sorted(set(texts) - known):
        raise bad_request(f"unknown fields {unknown}; known are {sorted(known)}", unknown[0])
    _check_model(studio, texts.get("model"))
    if texts.get("n", "1") != "1" or texts.get("size", "auto") != "auto":
        raise bad_request("edits give one picture of the first picture's size", "n")
    target, subject = (studio.take_picture(data, "image") for data in images)
    mask = studio.pictures.add(_hole(masks[0], studio, target))
    values: dict[str, Any] = {"target": target, "subject": subject, "mask": mask, "prompt": texts.get("prompt", "")}
    try:
        values |= {name: int(texts[name]) for name in ("seed", "steps") if name in texts}
        values |= {name: float(texts[name]) for name in ("guidance", "strength") if name in texts}
    except ValueError as error:
        raise bad_request(f"a field is not a number: {error}") from None
    format_ = texts.get("response_format")
    if format_ not in (None, "b64_json", "url"):
        raise bad_request(f"response_format={format_[:30]!r}; wanted b64_json or url", "response_format")
    return await _answer(request, studio, studio.work("insert", values), format_)


def _hole(data: bytes, studio: Studio, target: str) -> Image.Image:
    """OpenAI's mask, transparent where to paint, as ours; a mask without transparency is white there already."""
    image = studio.read_picture(data, "mask")
    if image.size != studio.pictures.open(target).size:
        raise bad_request("mask and image differ in size", "mask")
    if "A" in image.getbands():
        return image.getchannel("A").point(lambda a: 255 - a)
    return image.convert("L")


async def _form(request: Request, studio: Studio) -> dict[str, list[Any]]:
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise bad_request(f"content-type is {kind[:60]!r}; edits come as multipart/form-data")
    data = await read_bytes(request, 3 * studio.settings.max_upload_bytes)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data, "more_body": False}

    whole = Request(request.scope, receive)
    try:
        form = await whole.form(max_files=4, max_fields=32, max_part_size=2**20)
    except (MultiPartException, ApiError) as error:
        raise bad_request(f"the form cannot be read: {getattr(error, 'message', error)}") from None
    except Exception as error:  # starlette raises HTTPException of its own, and decoding may fail anywhere
        raise bad_request(f"the form cannot be read ({type(error).__name__})") from None
    found: dict[str, list[Any]] = {}
    for name, value in form.multi_items():
        found.setdefault(name, []).append(await value.read() if isinstance(value, UploadFile) else value)
    await form.close()
    for name in ("image", "image[]", "mask"):
        if any(isinstance(v, str) for v in found.get(name, [])):
            raise bad_request(f"{name} must be a file", name)
    if wrong := [n for n, v in found.items() if n not in ("image", "image[]", "mask") and isinstance(v[-1], bytes)]:
        raise bad_request(f"{wrong[0]} must not be a file", wrong[0])
    return found


def _check_model(studio: Studio, name: str | None) -> None:
    served = studio.worker.model.name
    if name is not None and name != served:
        raise ApiError(404, f"there is no model {name[:100]!r}; use {served!r}", param="model", code="model_not_found")


def _size(size: str | None) -> dict[str, int]:
    if size is None or size == "auto":
        return {}
    width, cross, height = size.partition("x")
    if not (cross and width.isdigit() and height.isdigit() and len(size) < 12):
        raise bad_request(f"size={size[:30]!r}; wanted such as '512x512', or 'auto'", "size")
    return {"width": int(width), "height": int(height)}


async def _answer(request: Request, studio: Studio, work: Work, format_: str | None) -> Response:
    job = studio.submit(work)
    try:
        done: Job = await unless_disconnected(request.receive, studio.wait(job))
    except ClientGoneError:
        studio.worker.cancel(job.id)
        return Response(status_code=499)
    if done.state == "failed":
        text = done.error or UNEXPECTED
        raise internal_error(text) if text.startswith(UNEXPECTED) else bad_request(text)
    if done.state == "cancelled":
        raise internal_error("the job was cancelled")
    data = []
    for name in done.pictures:
        if format_ == "url":
            data.append({"url": str(request.url_for("fetch", name=name))})
            continue
        path = studio.pictures.path(name)
        if path is None:
            raise internal_error("a picture was deleted before it was sent")
        data.append({"b64_json": base64.b64encode(path.read_bytes()).decode()})
    return JSONResponse({"created": int(time.time()), "data": data, "eff": {"job": job.id}})
