"""The server as a process of its own, on the embedded model in int8, as a user starts it."""

import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

START = "from eff_serve.cli import main; main()"


@contextmanager
def started(*arguments):
    """Start ``eff-serve`` on a free port; yields its address, process and output lines once the port is open."""
    environment = {"OMP_NUM_THREADS": "2", **os.environ}
    process = subprocess.Popen(
        [sys.executable, "-c", START, "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    lines, opened = [], threading.Event()

    def read():
        for line in process.stdout:
            lines.append(line)
            if "curl" in line:
                opened.set()
        opened.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert opened.wait(180), "the server did not start in time"
        assert any("curl" in line for line in lines), f"exit status {process.wait(30)}: {''.join(lines)}"
        address = re.search(r"http://[\d.]+:\d+", "".join(lines))[0]
        yield SimpleNamespace(address=address, process=process, lines=lines)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()
            reader.join(10)
            process.stdout.close()


@pytest.fixture(scope="session")
def start_server(smollm2):
    """``with start_server(*arguments) as running``: see `started`."""
    return started


@pytest.fixture(scope="module")
def server(start_server):
    with start_server() as running:
        yield running


@pytest.fixture
def metric(server):
    """``metric(name)`` is the sum of a metric's samples."""

    def read(name):
        text = urllib.request.urlopen(f"{server.address}/metrics", timeout=10).read().decode()
        values = [float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + "{")]
        assert values, f"no metric {name}"
        return sum(values)

    return read
