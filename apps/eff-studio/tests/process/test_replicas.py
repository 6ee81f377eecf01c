"""Two replicas by Ray Serve: jobs side by side, the pictures of one process, cancelling, a replica that dies."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
from eff_studio.engine import run_work
from eff_studio.store import Pictures
from eff_studio.work import Generate

pytest.importorskip("ray")
pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(``call(path, body)``, folder of the studio) of a server with two replicas."""
    data = tmp_path_factory.mktemp("studio")
    process = subprocess.Popen(
        [sys.executable, "-c", "from eff_studio.cli import main; main()", "--port", "0", "--data", str(data),
         "--replicas", "2", "--threads", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    lines, opened = [], threading.Event()

    def read():
        for line in process.stdout:
            lines.append(line)
            if "Page at" in line:
                opened.set()
        opened.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert opened.wait(300), "".join(lines)
        address = re.search(r"Page at (http://[\d.]+:\d+)", "".join(lines))
        assert address, "".join(lines)

        def call(path, body=None):
            sent = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(address[1] + path, sent, {"content-type": "application/json"})
            return json.load(urllib.request.urlopen(request, timeout=60))

        assert "2 replicas of collage-diffusion" in "".join(lines)
        yield call, data
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, "".join(lines)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        reader.join(30)
        process.stdout.close()


def submit(call, **settings):
    return call("/api/jobs", {"kind": "generate", "settings": {"prompt": "a dog and an apple", **settings}})["id"]


def ended(call, job, seconds=180):
    end = time.monotonic() + seconds
    while (found := call(f"/api/jobs/{job}"))["state"] in ("waiting", "running"):
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def test_jobs_run_side_by_side_and_give_the_same_pictures(server, collage):
    call, data = server
    jobs = [ended(call, name) for name in [submit(call, seed=seed, steps=12) for seed in range(4)]]
    assert [job["state"] for job in jobs] == ["done"] * 4
    assert any(a["started"] < b["started"] < a["ended"] for a in jobs for b in jobs), jobs
    store = Pictures(data / "pictures")
    for seed, job in enumerate(jobs):
        work = Generate(prompt="a dog and an apple", seed=seed, steps=12)
        alone = run_work(collage, work, open_picture=None, report=lambda p: None, cancelled=lambda: False)
        assert np.array_equal(np.array(store.open(job["pictures"][0])), np.array(alone.images[0]))


def test_cancelling_frees_the_replica_and_errors_come_back(server):
    call, _ = server
    long = [submit(call, seed=seed, steps=200) for seed in range(2)]
    while any(call(f"/api/jobs/{name}")["state"] == "waiting" for name in long):
        time.sleep(0.05)
    for name in long:
        call(f"/api/jobs/{name}/cancel", {})
        assert ended(call, name)["state"] == "cancelled"
    wrong = ended(call, submit(call, steps=2, width=256, height=256))
    assert wrong["state"] == "failed"
    assert "128 x 128 only" in wrong["error"]
    assert ended(call, submit(call, steps=2))["state"] == "done"


def test_a_replica_that_dies_loses_no_job(server):
    psutil = pytest.importorskip("psutil")
    call, _ = server
    job = submit(call, seed=3, steps=60)
    while call(f"/api/jobs/{job}")["state"] == "waiting":
        time.sleep(0.05)
    time.sleep(1.0)
    killed = [
        p for p in psutil.process_iter(["cmdline"]) if "ServeReplica:eff-studio" in " ".join(p.info["cmdline"] or ())
    ]
    assert killed
    for process in killed:
        process.kill()
    assert ended(call, job, 300)["state"] == "done"
