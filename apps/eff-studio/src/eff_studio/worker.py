"""The threads that work through the jobs, and tell whoever listens."""

from __future__ import annotations

import base64
import io
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from eff_studio.engine import CancelledError, Progress, Result
from eff_studio.store import Job, Jobs, Pictures

log = logging.getLogger("eff_studio")
Listener = Callable[[dict[str, Any]], None]
UNEXPECTED = "the job failed"  # how the error of a job begins that is no fault of its settings


@dataclass(frozen=True)
class Counts:
    """What the worker has done since it started.

    Attributes:
        done, failed, cancelled: Jobs by how they ended.
        pictures: Pictures made.
        busy_seconds: Time spent on jobs.
    """

    done: int = 0
    failed: int = 0
    cancelled: int = 0
    pictures: int = 0
    busy_seconds: float = 0.0


class Drawer(Protocol):
    """What the server needs to know of a model."""

    @property
    def name(self) -> str:
        """As the user gave it."""

    def facts(self) -> dict[str, Any]:
        """As `eff_studio.engine.StudioModel.facts`."""


class Worker:
    """Does one job after another, in one thread or several.

    Args:
        model: What draws.
        jobs: Where jobs come from.
        pictures: Where pictures go.
        run: Does a piece of work, as `eff_studio.engine.run_work` with the model.
        lanes: Jobs at a time.
    """

    def __init__(
        self, model: Drawer, jobs: Jobs, pictures: Pictures, *, run: Callable[..., Result], lanes: int = 1
    ) -> None:
        self.model, self.jobs, self.pictures = model, jobs, pictures
        self._run = run
        self.counts = Counts()
        self._stop = threading.Event()
        self._lock = threading.Condition()
        self._cancelled: set[str] = set()
        self._running: set[str] = set()
        self._last: dict[str, dict[str, Any]] = {}
        self._listeners: dict[str, list[tuple[Listener, bool]]] = {}
        self._threads = [
            threading.Thread(target=self._work, name=f"studio-worker-{i}", daemon=True) for i in range(lanes)
        ]

    def start(self) -> None:
        """Begin, with jobs that an earlier process left."""
        for thread in self._threads:
            thread.start()

    def stop(self, timeout: float = 60.0) -> None:
        """End after the current step; a job that is under way waits again."""
        with self._lock:
            self._stop.set()
            self._lock.notify_all()
            heard = list(self._listeners)
        for job in heard:  # nobody waits for what this process will not do
            self._tell(job, {"type": "stopped"})
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    @property
    def alive(self) -> bool:
        """Whether jobs are being worked through."""
        return all(thread.is_alive() for thread in self._threads) and not self._stop.is_set()

    @property
    def running(self) -> frozenset[str]:
        """Ids of the jobs under way."""
        return frozenset(self._running)

    def submit(self, job: Job) -> None:
        """There is a new job in the line."""
        with self._lock:  # nobody takes it meanwhile; a thread that was looking may have it already
            found = self.jobs.get(job.id)
            if found is not None and found.state == "waiting":
                self._tell(job.id, {"type": "state", "state": "waiting"})
            self._lock.notify()

    def cancel(self, job: str) -> bool:
        """Cancel a job that waits or runs; False if it does neither."""
        if self.jobs.cancel_waiting(job):
            self._tell(job, {"type": "state", "state": "cancelled"})
            return True
        with self._lock:
            if job not in self._running:
                return False
            self._cancelled.add(job)
        return True

    def listen(self, job: str, listener: Listener, *, previews: bool = False) -> Callable[[], None]:
        """Hear of a job from now on, its last news first; returns what ends it.

        Args:
            job: Its id.
            listener: Called with each event, from the worker's thread.
            previews: Whether the picture is wanted as it is at each step; it is only made if somebody does.
        """
        entry = (listener, previews)
        with self._lock:
            self._listeners.setdefault(job, []).append(entry)
            last = self._last.get(job)
        if last is not None:
            listener(last)

        def end() -> None:
            with self._lock:
                listeners = self._listeners.get(job, [])
                if entry in listeners:
                    listeners.remove(entry)
                if not listeners:
                    self._listeners.pop(job, None)

        return end

    def _tell(self, job: str, event: dict[str, Any]) -> None:
        with self._lock:
            self._last[job] = event
            if event.get("state") in ("done", "failed", "cancelled"):
                self._last.pop(job)
            listeners = list(self._listeners.get(job, ()))
        for listener, _ in listeners:
            listener(event)

    def _next(self) -> Job | None:
        """Wait for a job; None at the end."""
        with self._lock:  # between taking it and saying so a cancel would be lost
            while not self._stop.is_set():
                if (job := self.jobs.start_next()) is not None:
                    self._running.add(job.id)
                    return job
                self._lock.wait()
        return None

    def _work(self) -> None:
        while (job := self._next()) is not None:
            begun = time.monotonic()
            try:
                self._one(job)
            finally:
                with self._lock:
                    self._running.discard(job.id)
                    self._cancelled.discard(job.id)
                    self._add(seconds=time.monotonic() - begun)

    def _one(self, job: Job) -> None:
        self._tell(job.id, {"type": "state", "state": "running"})
        try:
            result = self._run(
                job.work,
                open_picture=self.pictures.open,
                report=lambda progress: self._progress(job.id, progress),
                cancelled=lambda: job.id in self._cancelled or self._stop.is_set(),
                previews=lambda: any(previews for _, previews in self._listeners.get(job.id, ())),
            )
            names = tuple(self.pictures.add(image, job.settings()) for image in result.images)
        except CancelledError:
            if self._stop.is_set():
                self.jobs.put_back(job.id)
                return
            self.jobs.end(job.id, "cancelled")
            self._add(cancelled=1)
            self._tell(job.id, {"type": "state", "state": "cancelled"})
        except Exception as error:
            expected = isinstance(error, (ValueError, TypeError))
            if not expected:
                log.exception("job %s failed", job.id)
            text = str(error) if expected else f"{UNEXPECTED} ({type(error).__name__}); the server's log says more"
            self.jobs.end(job.id, "failed", error=text)
            self._add(failed=1)
            self._tell(job.id, {"type": "state", "state": "failed", "error": text})
        else:
            self.jobs.end(job.id, "done", pictures=names, facts=result.facts)
            self._add(done=1, pictures=len(names))
            self._tell(job.id, {"type": "state", "state": "done", "pictures": list(names), "facts": result.facts})

    def _progress(self, job: str, progress: Progress) -> None:
        event: dict[str, Any] = {
            "type": "progress",
            "step": progress.step,
            "steps": progress.steps,
            "seconds_left": None if progress.seconds_left != progress.seconds_left else progress.seconds_left,
        }
        if progress.preview is not None:
            event["preview"] = data_url(progress.preview)
        self._tell(job, event)

    def _add(
        self, *, done: int = 0, failed: int = 0, cancelled: int = 0, pictures: int = 0, seconds: float = 0
    ) -> None:
        with self._lock:
            c = self.counts
            self.counts = Counts(
                *(c.done + done, c.failed + failed, c.cancelled + cancelled, c.pictures + pictures),
                c.busy_seconds + seconds,
            )


def data_url(image: Image.Image) -> str:
    """A small JPEG as a data URL."""
    out = io.BytesIO()
    image.convert("RGB").save(out, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
