"""A server in a process of its own."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from eff_http.testing import served_in_a_thread
from eff_studio.api import create_app


class Served:
    """A server that has opened its port.

    Attributes:
        process: Its process.
        said: What it has printed.
    """

    def __init__(self, process, said, address):
        self.process, self.said, self.address = process, said, address

    def call(self, path, body=None):
        """The JSON answer to a request; with a body it is a POST."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def submit(self, **settings):
        """Id of a new job that draws."""
        return self.call("/api/jobs", {"kind": "generate", "settings": settings})["id"]

    def wait(self, job, *states, seconds=60.0):
        """The job once it is in one of the states."""
        end = time.monotonic() + seconds
        while (found := self.call(f"/api/jobs/{job}"))["state"] not in states:
            assert time.monotonic() < end, found
            time.sleep(0.05)
        return found


@contextlib.contextmanager
def serving(*words, seconds=120.0):
    """Run Python with arguments that start a server; it and its children are killed at the end."""
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
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
        assert opened.wait(seconds), "the server did not start in time"
        assert any("Page at" in line for line in lines), "".join(lines)
        yield Served(process, lines, re.search(r"Page at (http://[\d.]+:\d+)", "".join(lines))[1])
    finally:
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
        reader.join(30)
        process.stdout.close()


@pytest.fixture(scope="session")
def serve():
    """``with serve(*words) as served``; see `serving` and `Served`."""
    return serving


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def opened():
    """Function that opens a worker's page in Chromium; whatever the page complains of fails the test."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    api = pytest.importorskip("playwright.sync_api")

    @contextlib.contextmanager
    def open_page(worker):
        problems = []
        with served_in_a_thread(create_app(worker)) as address, api.sync_playwright() as playwright:
            options = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.goto(address)
            yield page
            browser.close()
        assert problems == []

    return open_page


@pytest.fixture
def drag():
    """Function that moves the pressed mouse over the canvas between places given as shares of it."""

    def move(page, first, *then):
        bounds = page.locator("#canvas").bounding_box()
        at = [(bounds["x"] + x * bounds["width"], bounds["y"] + y * bounds["height"]) for x, y in (first, *then)]
        page.mouse.move(*at[0])
        page.mouse.down()
        for place in at[1:]:
            page.mouse.move(*place, steps=3)
        page.mouse.up()

    return move
