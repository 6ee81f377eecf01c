"""The page in Chromium: boxes by mouse, drawing, cancelling, what a reload keeps."""

import asyncio
import os
import shutil
import threading
import time

import pytest
import uvicorn
from eff_studio.api import create_app

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def address(worker):
    """Address of the app around the fake model."""
    server = uvicorn.Server(uvicorn.Config(create_app(worker), port=0, log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_draw_cancel_reload(address, worker, settle):
    api = pytest.importorskip("playwright.sync_api")
    problems = []
    with api.sync_playwright() as playwright:
        options = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        settle(lambda: "64" in page.inner_text("#model"))
        bounds = page.locator("#canvas").bounding_box()
        places = [(bounds["x"] + s * bounds["width"], bounds["y"] + s * bounds["height"]) for s in (0.1, 0.4, 0.6)]
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place, steps=3)
        page.mouse.up()
        page.keyboard.type("a dog")
        page.keyboard.press("Tab")
        page.fill("#prompt", "a dog")
        page.click("#layers button[title=Remove]")
        page.click("#undo")
        assert page.input_value("#layers input") == "a dog"
        page.click("#layers button[title=Remove]")  # the fake model draws no layout
        worker.model.pipe.gate.clear()
        page.click("#go")
        page.wait_for_selector("#cancel:not([hidden])")
        settle(lambda: worker.running)
        page.keyboard.press("Escape")
        settle(lambda: worker._cancelled)
        worker.model.pipe.gate.set()
        settle(lambda: page.inner_text("#status") == "cancelled")
        page.fill("#seed", "5")
        page.click("#go")
        settle(lambda: page.locator("#history img").count() == 1)
        settle(lambda: page.locator("#pointers button").count() == 1)
        page.reload()
        settle(lambda: page.locator("#history img").count() == 1)
        assert page.locator("#history .state").inner_text() == "cancelled"
        assert page.input_value("#seed") == "5"
        page.click("#use")
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280
        browser.close()
    assert problems == []
    assert worker.jobs.latest(1)[0].work.seed == 5
