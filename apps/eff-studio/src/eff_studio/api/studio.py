"""The state of one app, and what all its routes need."""

from __future__ import annotations

import asyncio
from typing import Any

from eff_http import ApiError, bad_request, read_body, retry_later
from fastapi import Request
from PIL import Image

from eff_studio.api.metrics import Metrics
from eff_studio.api.settings import ServerSettings
from eff_studio.store import Job, Jobs, Pictures, Rejected, read_picture
from eff_studio.work import Work, pictures_of, read_work
from eff_studio.worker import Worker

ENDED = ("done", "failed", "cancelled")


class Studio:
    """Worker, store and settings of one app.

    Args:
        worker: Does the jobs.
        settings: Limits and keys.
    """

    def __init__(self, worker: Worker, settings: ServerSettings) -> None:
        self.worker, self.settings = worker, settings
        self.jobs: Jobs = worker.jobs
        self.pictures: Pictures = worker.pictures
        self.metrics = Metrics(worker)
        self.draining = False

    def submit(self, work: Work) -> Job:
        """Put work in line.

        Raises:
            ApiError: 429 if the line is full, 503 while the server closes.
        """
        if self.draining:
            raise self.closing()
        waiting = self.jobs.waiting()
        if waiting >= self.settings.max_waiting:
            raise retry_later(429, f"{waiting} jobs are waiting, and this server takes no more", "queue_full", 5)
        job = self.jobs.add(work)
        self.worker.submit(job)
        return job

    def closing(self) -> ApiError:
        """What a client hears that would have to wait beyond the end of this process."""
        return retry_later(503, "the server is shutting down; jobs in line go on when it is back", "draining", 5)

    def job(self, name: str) -> Job:
        """A job by id; 404 if there is none."""
        found = self.jobs.get(name[:64])
        if found is None:
            raise ApiError(404, f"there is no job {name[:64]!r}", code="job_not_found")
        return found

    def describe(self, job: Job) -> dict[str, Any]:
        """A job as clients see it."""
        ahead = self.jobs.ahead_of(job) + len(self.worker.running) if job.state == "waiting" else None
        return {
            "id": job.id,
            **job.settings(),
            "state": job.state,
            "created": job.created,
            "started": job.started,
            "ended": job.ended,
            "error": job.error,
            "pictures": list(job.pictures),
            "facts": job.facts,
            "ahead": ahead,
        }

    def work(self, kind: str, values: dict[str, Any]) -> Work:
        """Settings of a request; 400 if they are wrong."""
        try:
            work = read_work(kind, values)
        except (ValueError, TypeError) as error:
            raise bad_request(str(error), "settings") from None
        for name, given in pictures_of(work).items():
            if self.pictures.path(given) is None:
                raise bad_request(f"there is no picture {given[:60]!r}; send it to /api/pictures first", name)
        return work

    async def wait(self, job: Job) -> Job:
        """Wait until a job has ended."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def listen(event: dict[str, Any]) -> None:
            if event.get("state") in ENDED or event["type"] == "stopped":
                loop.call_soon_threadsafe(ended.set)

        stop = self.worker.listen(job.id, listen)
        try:
            if (found := self.job(job.id)).state not in ENDED:
                await ended.wait()
                found = self.job(job.id)
            if found.state not in ENDED:
                raise self.closing()
            return found
        finally:
            stop()

    def read_picture(self, data: bytes, param: str | None = None) -> Image.Image:
        """What a client sent; 400 if it is no picture."""
        try:
            return read_picture(data)
        except Rejected as error:
            raise bad_request(str(error), param) from None

    def take_picture(self, data: bytes, param: str | None = None) -> str:
        """Store what a client sent; 400 if it is no picture."""
        return self.pictures.add(self.read_picture(data, param))


def studio_of(request: Request) -> Studio:
    """The state of a request's app."""
    found = request.app.state.studio
    assert isinstance(found, Studio)
    return found


async def read_bytes(request: Request, most: int) -> bytes:
    """The body of a request of at most ``most`` bytes, within the time of the server's limits."""
    return await read_body(request, most, request.app.state.limits.max_seconds)
