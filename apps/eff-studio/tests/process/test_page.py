"""The page in Chromium: boxes by mouse, drawing, cancelling, what a reload keeps."""

import asyncio
import contextlib
import os
import shutil
import threading
import time

import pytest
import uvicorn
from eff_studio.api import create_app

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NEEDS = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@contextlib.contextmanager
def serving(worker):
    """Address of the app around a worker."""
    server = uvicorn.Server(uvicorn.Config(create_app(worker), port=0, log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


@contextlib.contextmanager
def opened(worker):
    """The page in a browser; whatever it complains of fails the test."""
    api = pytest.importorskip("playwright.sync_api")
    problems = []
    with serving(worker) as address, api.sync_playwright() as playwright:
        options = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        yield page
        browser.close()
    assert problems == []


def drag(page, first, *then):
    """Draw a box on the canvas between places given as shares of it."""
    bounds = page.locator("#canvas").bounding_box()
    at = [(bounds["x"] + x * bounds["width"], bounds["y"] + y * bounds["height"]) for x, y in (first, *then)]
    page.mouse.move(*at[0])
    page.mouse.down()
    for place in at[1:]:
        page.mouse.move(*place, steps=3)
    page.mouse.up()


@pytest.mark.slow
@NEEDS
def test_draw_cancel_reload(worker, settle):
    with opened(worker) as page:
        settle(lambda: "64" in page.inner_text("#model"))
        drag(page, (0.1, 0.1), (0.4, 0.4), (0.6, 0.6))
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
    assert worker.jobs.latest(1)[0].work.seed == 5


@pytest.mark.slow
@NEEDS
def test_objects_lie_where_they_were_drawn(make_worker, collage, settle):
    """Boxes drawn by mouse come out as a picture on which the judge finds the named objects inside of them."""
    from eff_embedded.judge import load_judge

    judge, worker = load_judge(), make_worker(collage)
    boxes = {"apple": ((0.03, 0.05), (0.47, 0.5)), "car": ((0.53, 0.5), (0.97, 0.95))}
    inside = []
    with opened(worker) as page:
        settle(lambda: "128" in page.inner_text("#model"))
        for name, corners in boxes.items():
            drag(page, *corners)
            page.keyboard.type(f"a {name} on a yellow background")
            page.keyboard.press("Tab")
        page.fill("#prompt", "an apple and a car on a yellow background")
        for seed in range(4):
            page.fill("#seed", str(seed))
            page.click("#go")
            settle(lambda made=seed + 1: page.locator("#history img").count() == made, 120)
            (job,) = worker.jobs.latest(1)
            (reading,) = judge(worker.pictures.open(job.pictures[0]))
            for name, ((left, top), (right, bottom)) in boxes.items():
                found = reading.find(name)
                x, y = found.centre if found else (-1, -1)
                inside.append(128 * left <= x <= 128 * right and 128 * top <= y <= 128 * bottom)
    assert sum(inside) >= 6, inside
