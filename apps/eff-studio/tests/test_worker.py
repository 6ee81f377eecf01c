"""The worker: progress, every way to end, and what is left for the next start."""

import io
import threading

import numpy as np
import pytest
from eff_studio.store import read_settings
from eff_studio.work import Generate, Segment


class Heard(list):
    """Events of a job; ``ended`` is set by the last."""

    def __init__(self, worker, job):
        super().__init__()
        self.ended = threading.Event()
        self.stop = worker.listen(job.id, self)

    def __call__(self, event):
        self.append(event)
        if event.get("state") in ("done", "failed", "cancelled") or event["type"] == "stopped":
            self.ended.set()


@pytest.fixture
def run(worker):
    """``run(work)`` does it and returns the job and what was heard."""

    def do(work):
        job = worker.jobs.add(work)
        heard = Heard(worker, job)
        worker.submit(job)
        assert heard.ended.wait(30)
        heard.stop()
        return worker.jobs.get(job.id), heard

    return do


def test_done(worker, run):
    job, heard = run(Generate(prompt="x", steps=3, count=2, seed=5))
    assert job.state == "done"
    steps = [(e["step"], e["steps"]) for e in heard if e["type"] == "progress"]
    assert steps == [(i + 1, 6) for i in range(6)]
    assert all(e["seconds_left"] >= 0 for e in heard if e["type"] == "progress")
    assert heard[-1]["pictures"] == list(job.pictures)
    alone, _ = run(Generate(prompt="x", steps=3, seed=6))
    pictures = [np.array(worker.pictures.open(name)) for name in (*job.pictures, *alone.pictures)]
    assert np.array_equal(pictures[1], pictures[2])
    assert not np.array_equal(pictures[0], pictures[1])
    inside = read_settings(worker.pictures.path(job.pictures[0]).read_bytes())
    assert inside == job.settings()
    assert worker.counts.done == 2
    assert worker.counts.pictures == 3
    assert worker.counts.busy_seconds > 0
    assert not worker._last
    assert not worker._listeners


def test_the_model_gets_what_was_asked(worker, run):
    run(Generate(prompt="x", negative="y", guidance=2.5, steps=2))
    assert worker.model.pipe.calls == [{"prompt": "x", "steps": 2, "guidance_scale": 2.5, "negative_prompt": "y"}]


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (Generate(prompt="x", width=128, height=64), "64 x 64 only"),
        (Generate(prompt="x", concepts="unknown"), "no 'unknown' among the studio's concepts"),
        (Segment(picture="0" * 32, phrase="x"), "there is no picture"),
        (Generate(prompt="boom"), r"the job failed \(RuntimeError\); the server's log says more"),
    ],
)
def test_failed(worker, run, work, words, caplog):
    import re

    job, heard = run(work)
    assert job.state == "failed"
    assert re.search(words, job.error)
    assert heard[-1]["error"] == job.error
    assert "secret" not in job.error
    assert ("secret" in caplog.text) == (work.__class__ is Generate and work.prompt == "boom")
    assert run(Generate(prompt="x", steps=1))[0].state == "done"  # the worker goes on
    assert worker.counts.failed == 1


def test_cancel_waiting_and_running(worker, settle):
    worker.model.pipe.gate.clear()
    first, second = (worker.jobs.add(Generate(prompt="x", steps=4)) for _ in range(2))
    heard = [Heard(worker, job) for job in (first, second)]
    worker.submit(first)
    settle(lambda: first.id in worker.running)
    assert worker.cancel(second.id)
    assert worker.jobs.get(second.id).state == "cancelled"
    assert worker.cancel(first.id)
    assert worker.jobs.get(first.id).state == "running"  # until the step is over
    worker.model.pipe.gate.set()
    assert heard[0].ended.wait(30)
    assert worker.jobs.get(first.id).state == "cancelled"
    assert [h[-1]["state"] for h in heard] == ["cancelled", "cancelled"]
    assert not worker.cancel(first.id)
    assert not worker.cancel("nonsense")
    settle(lambda: not worker.running)
    assert not worker._cancelled
    assert worker.counts.cancelled == 1


def test_late_listeners_hear_the_last_news(worker, settle):
    worker.model.pipe.gate.clear()
    job = worker.jobs.add(Generate(prompt="x", steps=1))
    worker.submit(job)
    settle(lambda: job.id in worker.running)
    heard = Heard(worker, job)
    assert heard[0]["type"] == "state"
    worker.model.pipe.gate.set()
    assert heard.ended.wait(30)


def test_stop_puts_the_job_back(make_worker, fake, settle):
    worker = make_worker(fake)
    fake.pipe.gate.clear()
    job, later = (worker.jobs.add(Generate(prompt="x", steps=5)) for _ in range(2))
    heard = Heard(worker, later)
    worker.submit(job)
    settle(lambda: job.id in worker.running)
    threading.Timer(0.2, fake.pipe.gate.set).start()
    worker.stop()
    assert not worker.alive
    assert heard[-1]["type"] == "stopped"
    assert worker.jobs.get(job.id).state == "waiting"
    assert worker.counts.cancelled == 0
    again = make_worker(fake)
    settle(lambda: again.jobs.get(later.id).state == "done")
    assert again.jobs.get(job.id).state == "done"


def test_a_preview_travels_as_jpeg():
    from eff_studio.worker import data_url
    from PIL import Image

    url = data_url(Image.new("RGBA", (4, 4), "red"))
    assert url.startswith("data:image/jpeg;base64,")
    import base64

    assert Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size == (4, 4)
