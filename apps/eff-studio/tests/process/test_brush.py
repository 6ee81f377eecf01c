"""The brush in Chromium: the subject is painted into a hole drawn by mouse, and a drawing is seen as it becomes."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

COUNT = """() => {
    window.shown = new Set();
    const draw = CanvasRenderingContext2D.prototype.drawImage;
    CanvasRenderingContext2D.prototype.drawImage = function (image, ...rest) {
        if (image instanceof HTMLImageElement) window.shown.add(image.src);
        return draw.call(this, image, ...rest);
    };
}"""


@pytest.mark.slow
def test_paint_into_a_hole(make_worker, collage, opened, drag, settle, tmp_path):
    target = Image.new("RGB", (128, 128), (240, 220, 120))
    ImageDraw.Draw(target).ellipse((10, 40, 50, 90), fill=(40, 90, 200))
    subject = Image.new("RGB", (64, 64), (240, 220, 120))
    ImageDraw.Draw(subject).rectangle((12, 12, 52, 52), fill=(200, 30, 30))
    target.save(tmp_path / "target.png")
    subject.save(tmp_path / "subject.png")
    worker = make_worker(collage)
    with opened(worker) as page:
        settle(lambda: "128" in page.inner_text("#model"))
        page.click("[data-mode=insert]")
        page.set_input_files("#target", str(tmp_path / "target.png"))
        page.set_input_files("#subject", str(tmp_path / "subject.png"))
        page.fill("#prompt", "a gift and a balloon on a yellow background")
        page.fill("#steps", "12")
        page.wait_for_timeout(500)  # both pictures are sent

        page.click("#go")
        settle(lambda: "hole" in page.inner_text("#status"))  # nothing is painted yet: the page says so
        drag(page, (0.7, 0.5), (0.85, 0.5))
        page.click("#go")
        settle(lambda: page.locator("#history img").count() == 1, 120)
        page.click("[data-mode=generate]")
        page.fill("#prompt", "a dog on a yellow background")
        page.evaluate(COUNT)
        page.click("#go")
        settle(lambda: page.locator("#history img").count() == 2, 120)
        shown = page.evaluate("window.shown.size")
    assert shown >= 4, "pictures on their way were not shown"
    _, job = worker.jobs.latest(2)
    made = np.asarray(worker.pictures.open(job.pictures[0]).convert("RGB"))
    mask = worker.pictures.open(job.work.mask).convert("L")
    hole = np.asarray(mask) > 0
    beyond = np.asarray(mask.filter(ImageFilter.MaxFilter(17))) == 0  # the seam is 8 points wide
    assert hole[64, 96]
    assert not hole[:, :64].any()
    assert beyond.mean() > 0.8
    assert np.array_equal(made[beyond], np.asarray(target)[beyond])
    assert not np.array_equal(made[hole], np.asarray(target)[hole])
