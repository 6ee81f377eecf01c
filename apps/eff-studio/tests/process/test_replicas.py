"""Two replicas by Ray Serve: jobs side by side, the pictures of one process, cancelling, a replica that dies."""

import signal
import time

import numpy as np
import pytest
from eff_studio.engine import run_work
from eff_studio.store import Pictures
from eff_studio.work import Generate

pytest.importorskip("ray")
pytestmark = pytest.mark.cluster
PROMPT = "a dog and an apple"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("studio")


@pytest.fixture(scope="module")
def server(serve, folder):
    """A server with two replicas."""
    words = ("--port", "0", "--data", folder, "--replicas", "2", "--threads", "1")
    with serve("-c", "from eff_studio.cli import main; main()", *words, seconds=300) as served:
        assert "2 replicas of collage-diffusion" in "".join(served.said)
        yield served
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(60) == 0, "".join(served.said)


def ended(server, job, seconds=180):
    return server.wait(job, "done", "failed", "cancelled", seconds=seconds)


def test_jobs_run_side_by_side_and_give_the_same_pictures(server, folder, collage):
    names = [server.submit(prompt=PROMPT, seed=seed, steps=12) for seed in range(4)]
    jobs = [ended(server, name) for name in names]
    assert [job["state"] for job in jobs] == ["done"] * 4
    assert any(a["started"] < b["started"] < a["ended"] for a in jobs for b in jobs), jobs
    store = Pictures(folder / "pictures")
    for seed, job in enumerate(jobs):
        work = Generate(prompt=PROMPT, seed=seed, steps=12)
        alone = run_work(collage, work, open_picture=None, report=lambda p: None, cancelled=lambda: False)
        assert np.array_equal(np.array(store.open(job["pictures"][0])), np.array(alone.images[0]))


def test_cancelling_frees_the_replica_and_errors_come_back(server):
    long = [server.submit(prompt=PROMPT, seed=seed, steps=200) for seed in range(2)]
    for name in long:
        server.wait(name, "running")
    for name in long:
        server.call(f"/api/jobs/{name}/cancel", {})
        assert ended(server, name)["state"] == "cancelled"
    wrong = ended(server, server.submit(prompt=PROMPT, steps=2, width=256, height=256))
    assert wrong["state"] == "failed"
    assert "128 x 128 only" in wrong["error"]
    assert ended(server, server.submit(prompt=PROMPT, steps=2))["state"] == "done"


def test_a_replica_that_dies_loses_no_job(server):
    psutil = pytest.importorskip("psutil")
    job = server.submit(prompt=PROMPT, seed=3, steps=60)
    server.wait(job, "running")
    time.sleep(1.0)
    running = psutil.process_iter(["cmdline"])
    killed = [p for p in running if "ServeReplica:eff-studio" in " ".join(p.info["cmdline"] or ())]
    assert killed
    for process in killed:
        process.kill()
    assert ended(server, job, 300)["state"] == "done"
