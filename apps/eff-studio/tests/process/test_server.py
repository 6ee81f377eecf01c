"""The server as a process: killed, started again, ended by a signal."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

FAKE = Path(__file__).parents[1] / "fake_studio.py"


@contextmanager
def started(data):
    """The fake model served; yields (process, ``call(path, body)``)."""
    process = subprocess.Popen(
        [sys.executable, str(FAKE), "--port", "0", "--data", str(data)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
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
        assert opened.wait(120), "the server did not start in time"
        assert any("Page at" in line for line in lines), "".join(lines)
        address = re.search(r"http://[\d.]+:\d+", "".join(lines))[0]

        def call(path, body=None):
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(address + path, data, {"content-type": "application/json"})
            return json.load(urllib.request.urlopen(request, timeout=30))

        yield process, call
    finally:
        process.kill()
        process.wait(30)
        reader.join(10)
        process.stdout.close()


def wait_for(call, job, states):
    end = time.monotonic() + 60
    while (found := call(f"/api/jobs/{job['id']}"))["state"] not in states:
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_jobs_outlive_a_kill_and_a_stop(tmp_path):
    with started(tmp_path) as (process, call):
        done = call("/api/jobs", {"kind": "generate", "settings": {"prompt": "x", "steps": 1}})
        done = wait_for(call, done, ["done"])
        running = call("/api/jobs", {"kind": "generate", "settings": {"prompt": "x", "steps": 40, "seed": 1}})
        waiting = call("/api/jobs", {"kind": "generate", "settings": {"prompt": "x", "steps": 200, "seed": 2}})
        wait_for(call, running, ["running"])
        process.kill()
        process.wait(30)
    with started(tmp_path) as (process, call):
        assert call(f"/api/jobs/{done['id']}") == done
        finished = wait_for(call, running, ["done"])
        assert finished["settings"]["seed"] == 1
        assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
        wait_for(call, waiting, ["running"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    from eff_studio.store import Jobs

    jobs = Jobs(tmp_path / "studio.db")
    assert jobs.get(waiting["id"]).state == "waiting"
    jobs.close()
