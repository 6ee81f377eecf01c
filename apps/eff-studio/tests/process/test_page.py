"""The page in Chromium: boxes by mouse, drawing, cancelling, what a reload keeps."""

import pytest


@pytest.mark.slow
def test_draw_cancel_reload(worker, opened, drag, settle):
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
def test_objects_lie_where_they_were_drawn(make_worker, collage, opened, drag, settle):
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
        page.click("summary:has-text('Heads')")  # and heads beside the layout
        page.click("#heads button[title='layer 1, head 1']")
        page.click("#go")
        settle(lambda: page.locator("#history img").count() == 5, 120)
        before, after = job, worker.jobs.latest(1)[0]
        assert after.work.heads.weights == ((1, 1, 0.5),)
        assert len(after.work.layers) == 2
        both, alone = (worker.pictures.open(done.pictures[0]).tobytes() for done in (after, before))
        assert both != alone
    assert sum(inside) >= 6, inside


@pytest.mark.slow
def test_tools_of_the_page(worker, opened, drag, settle, tmp_path):
    """Heads, grid, comparing, settings from a picture, keys, words to click, a phone, the dark."""
    with opened(worker) as page:
        settle(lambda: "64" in page.inner_text("#model"))
        page.fill("#prompt", "a dog")
        page.fill("#steps", "2")
        page.keyboard.press("Control+Enter")
        settle(lambda: page.locator("#history img").count() == 1)
        assert worker.jobs.latest(1)[0].work.steps == 2

        page.click("summary:has-text('Grid')")
        page.fill("#x-values", "2, 5")
        page.fill("#y-values", "7, 8")
        page.click("#draw-grid")
        settle(lambda: page.locator("#grid img").count() == 4)
        drawn = [(job.work.guidance, job.work.seed) for job in worker.jobs.latest(4)]
        assert drawn == [(5, 8), (2, 8), (5, 7), (2, 7)]

        page.click("#pin")
        page.wait_for_selector("#pinned:not([hidden]) img")
        page.click("#unpin")
        assert page.locator("#pinned").is_hidden()

        page.click("summary:has-text('Heads')")
        page.click("#heads button[title='layer 1, head 0']")
        for id, value in (("damage", "0.25"), ("head-start", "0.2"), ("head-stop", "0.6"), ("head-scale", "1.5")):
            page.evaluate(
                "([id, v]) => { const f = document.getElementById(id); f.value = v; "
                "f.dispatchEvent(new Event('change')); }",
                [id, value],
            )
        page.click("#heads button[title='layer 0, head 1']")
        page.keyboard.press("Escape")
        page.click("#go")  # the fake model has no heads: the job ends with an error, which is shown
        settle(lambda: worker.jobs.latest(1)[0].state == "failed")
        heads = worker.jobs.latest(1)[0].work.heads
        assert heads.weights == ((1, 0, 0.5), (0, 1, 0.25))
        assert (heads.window, heads.scale) == ((0.2, 0.6), 1.5)
        settle(lambda: "bad" in (page.get_attribute("#status", "class") or ""))
        page.click("#no-heads")
        assert page.locator("#heads [aria-pressed=true]").count() == 0
        page.locator("#stage").focus()
        page.keyboard.press("Control+z")
        assert page.locator("#heads [aria-pressed=true]").count() == 2
        page.click("#no-heads")

        # A picture of the studio, dropped on the page, gives the settings that are in it.
        first = worker.jobs.latest(6)[-1]
        file = worker.pictures.path(first.pictures[0]).read_bytes()
        page.evaluate(
            """bytes => { const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "a.png", { type: "image/png" }));
            document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true })); }""",
            list(file),
        )
        settle(lambda: page.inner_text("#status") == "took the settings of the picture")
        assert page.input_value("#prompt") == "a dog"
        assert page.input_value("#steps") == "2"

        page.locator("#history img").first.click()
        page.locator("#pointers button", has_text="dog").click()
        # The job before this one failed as well.
        settle(lambda: getattr(worker.jobs.latest(1)[0].work, "phrase", "") == "the dog")
        settle(lambda: worker.jobs.latest(1)[0].state == "failed")  # nor does it know where a dog is

        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            for width in (400, 1280):
                page.set_viewport_size({"width": width, "height": 800})
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                page.screenshot(path=tmp_path / f"{scheme}-{width}.png")
        colours = [page.evaluate("getComputedStyle(document.body).backgroundColor")]
        page.emulate_media(color_scheme="light")
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert colours[0] != colours[1]
