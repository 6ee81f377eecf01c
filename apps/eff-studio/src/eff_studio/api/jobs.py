"""Jobs: submit, look, listen, cancel, forget."""

from __future__ import annotations

import asyncio
from typing import Any

from eff_http import EventStream, JsonRoute, RequestModel, SendEvent, bad_request
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict

from eff_studio.api.studio import ENDED, studio_of
from eff_studio.work import Generate, Insert, Segment

router = APIRouter(prefix="/api", route_class=JsonRoute, tags=["jobs"])
_MOST = 200
_DEFAULTS = {
    "generate": Generate(prompt="x").to_dict() | {"prompt": ""},
    "insert": Insert(subject="", target="", mask="").to_dict(),
    "segment": Segment(picture="", phrase="x").to_dict() | {"phrase": ""},
}


class NewJob(RequestModel):
    """A piece of work.

    Attributes:
        kind: generate, insert or segment.
        settings: Of this kind; what is left out has its default.
    """

    kind: str
    settings: dict[str, Any]


class Event(BaseModel):
    """News of a job: ``type`` is "state" or "progress"."""

    model_config = ConfigDict(extra="allow")

    type: str


@router.get("/model")
async def model(request: Request) -> dict[str, Any]:
    """What the model is and has, and the default settings of each kind of work."""
    studio = studio_of(request)
    return {**studio.worker.model.facts(), "defaults": _DEFAULTS}


@router.post("/jobs", status_code=201)
async def submit(body: NewJob, request: Request) -> dict[str, Any]:
    """Put work in line."""
    studio = studio_of(request)
    return studio.describe(studio.submit(studio.work(body.kind, body.settings)))


@router.get("/jobs")
async def latest(request: Request, count: int = 50, before: float | None = None) -> dict[str, Any]:
    """The newest jobs, newest first; ``before`` is the ``created`` of the last one of an earlier answer."""
    if not 1 <= count <= _MOST:
        raise bad_request(f"count={count}; wanted 1 to {_MOST}", "count")
    studio = studio_of(request)
    return {"jobs": [studio.describe(job) for job in studio.jobs.latest(count, before=before)]}


@router.get("/jobs/{name}")
async def job(name: str, request: Request) -> dict[str, Any]:
    """One job."""
    studio = studio_of(request)
    return studio.describe(studio.job(name))


@router.post("/jobs/{name}/cancel")
async def cancel(name: str, request: Request) -> dict[str, Any]:
    """Cancel a job that waits or runs; one that has ended stays as it is."""
    studio = studio_of(request)
    studio.job(name)
    studio.worker.cancel(name)
    return studio.describe(studio.job(name))


@router.delete("/jobs/{name}", status_code=204)
async def remove(name: str, request: Request) -> Response:
    """Forget a job that has ended, and delete its pictures; one that has not is cancelled first."""
    studio = studio_of(request)
    found = studio.job(name)
    if found.state not in ENDED:
        studio.worker.cancel(name)
        found = await studio.wait(found)
    if (gone := studio.jobs.remove(name)) is not None:
        for picture in gone.pictures:
            studio.pictures.remove(picture)
    return Response(status_code=204)


@router.get("/jobs/{name}/events")
async def events(name: str, request: Request) -> EventStream:
    """News of a job as server-sent events, until it has ended."""
    studio = studio_of(request)
    studio.job(name)
    loop = asyncio.get_running_loop()
    news: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def listen(event: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(news.put_nowait, event)

    stop = studio.worker.listen(name, listen, previews=True)

    async def produce(send: SendEvent) -> None:
        found = studio.job(name)  # it may have ended before anybody listened
        while found.state not in ENDED:
            event = await news.get()
            while not news.empty() and event["type"] == "progress":
                event = news.get_nowait()  # a slow client gets the newest
            if event["type"] == "stopped":
                raise studio.closing()
            if event.get("state") in ENDED:
                break
            await send(Event(**event))
        found = studio.job(name)
        await send(Event(type="state", **{k: v for k, v in studio.describe(found).items() if k != "kind"}))

    return EventStream(produce, client_gone=lambda: None, close=stop, headers={})
