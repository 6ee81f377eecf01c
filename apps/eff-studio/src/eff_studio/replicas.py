"""Several copies of the model, each in a process of its own, by Ray Serve: on one machine or on the nodes of a cluster.

The server keeps the page, the line of jobs and the pictures. A replica holds a model and does one piece of work at a
time.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from PIL import Image

from eff_studio.engine import CancelledError, Progress, Result, StudioModel, run_work
from eff_studio.engine.draw import Open, Report
from eff_studio.work import Work, described, pictures_of, read_work

# A job whose replica died is begun again on another one, so often.
_TRIES = 3


class Failure(NamedTuple):
    """Why a replica could not do a piece of work; ``expected`` if the work itself is to blame."""

    text: str
    expected: bool


class Replica:
    """What runs in a replica's process.

    Args:
        load: Loads the model.
    """

    def __init__(self, load: Callable[[], StudioModel]) -> None:
        self.model = load()

    async def about(self) -> tuple[str, dict[str, Any], str]:
        """Name, facts and device of the model."""
        return self.model.name, self.model.facts(), str(self.model.pipe.device)

    async def draw(self, work: dict[str, Any], pictures: dict[str, Image.Image]) -> AsyncIterator[Any]:
        """Do one piece of work: gives Progress after each step, then a Result or a Failure."""
        loop, news = asyncio.get_running_loop(), asyncio.Queue[Any]()
        gone = threading.Event()

        def tell(event: Any) -> None:
            loop.call_soon_threadsafe(news.put_nowait, event)

        def do() -> None:
            try:
                tell(
                    run_work(
                        self.model,
                        read_work(work["kind"], work["settings"]),
                        open_picture=pictures.__getitem__,
                        report=tell,
                        cancelled=gone.is_set,
                        previews=lambda: True,
                    )
                )
            except CancelledError:
                tell(None)
            except Exception as error:
                tell(Failure(str(error), isinstance(error, (ValueError, TypeError))))

        working = threading.Thread(target=do, name="studio-replica")
        working.start()
        try:
            while isinstance(event := await news.get(), Progress):
                yield event
            if event is not None:
                yield event
        finally:  # also when the caller has gone: the next piece of work begins after this step
            gone.set()
            await asyncio.to_thread(working.join)


class Replicas:
    """The replicas as the worker sees them: like a model.

    Args:
        handle: Ray Serve's handle.
        count: How many there are.
    """

    def __init__(self, handle: Any, count: int) -> None:
        self.handle, self.count = handle, count
        self.name, self._facts, self.device = handle.about.remote().result()

    def facts(self) -> dict[str, Any]:
        """As `eff_studio.engine.StudioModel.facts`."""
        return self._facts

    def run(
        self,
        work: Work,
        *,
        open_picture: Open,
        report: Report,
        cancelled: Callable[[], bool],
        previews: Callable[[], bool] = lambda: False,
    ) -> Result:
        """As `eff_studio.engine.run_work` with a model, on whichever replica is free; previews are always made."""
        from ray.exceptions import RayActorError

        pictures = {name: open_picture(name) for name in pictures_of(work).values()}
        for attempt in range(1, _TRIES + 1):
            try:
                return self._once(work, pictures, report, cancelled)
            except RayActorError as error:
                if attempt == _TRIES:
                    raise RuntimeError(f"{attempt} replicas died over this work") from error
        raise AssertionError

    def _once(
        self, work: Work, pictures: dict[str, Image.Image], report: Report, cancelled: Callable[[], bool]
    ) -> Result:
        if cancelled():
            raise CancelledError
        stream = self.handle.options(stream=True).draw.remote(described(work), pictures)
        for event in stream:
            if isinstance(event, Result):
                return event
            if isinstance(event, Failure):
                raise (ValueError if event.expected else RuntimeError)(event.text)
            if cancelled():
                stream.cancel()
                raise CancelledError
            report(event)
        raise RuntimeError("a replica ended its work without a result")


@contextmanager
def started(load: Callable[[], StudioModel], count: int, *, address: str | None, gpus: int) -> Iterator[Replicas]:
    """Replicas for as long as the context lives.

    Args:
        load: Loads the model, in the replica's process.
        count: How many.
        address: Of a running Ray cluster, such as "auto"; None starts one on this machine.
        gpus: For each.

    Raises:
        ImportError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    # One job at a time: a model draws one picture after another, and the line of jobs is the server's.
    cores = max(1, (os.cpu_count() or 1) // count)
    ray.init(address=address, log_to_driver=False, **({} if address else {"include_dashboard": False}))
    deployment = serve.deployment(
        Replica,
        name="eff-studio",
        num_replicas=count,
        max_ongoing_requests=1,
        ray_actor_options={"num_cpus": cores if address is None else 1, "num_gpus": gpus},
    )
    try:
        yield Replicas(serve.run(deployment.bind(load), name="eff-studio", route_prefix=None), count)
    finally:
        serve.delete("eff-studio")
        if address is None:
            serve.shutdown()
        ray.shutdown()
