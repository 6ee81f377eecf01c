"""Canvases, spans, and the way back into the target."""

import numpy as np
import pytest
import torch
from eff_guidance.context_brush import CanvasSpans, ContextBrushConfig, build_incontext_canvas, stitch

Image = pytest.importorskip("PIL.Image")


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def hole(width, height, box):
    made = np.zeros((height, width), bool)
    made[box[1] : box[3], box[0] : box[2]] = True
    return made


def test_the_paper_s_sizes():
    canvas = build_incontext_canvas(picture(50, 40), picture(90, 60), hole(90, 60, (30, 20, 60, 50)))
    assert canvas.image.size == canvas.mask.size == (768, 1536)
    assert canvas.spans.num_tokens == 4608
    text = 512
    assert canvas.spans.subject_index(text) == slice(512, 512 + 2304)
    assert canvas.spans.query_index(text) == slice(512 + 2304, 512 + 2 * 2304)
    assert canvas.query_box == (0, 768, 768, 1536)
    assert not np.asarray(canvas.mask)[:768].any()
    assert canvas.mask.getpixel((384, 768 + 400)) == 255


def test_side_by_side_is_scattered():
    spans = build_incontext_canvas(
        picture(9, 9), picture(9, 9), hole(9, 9, (2, 2, 5, 5)), size=32, layout="horizontal"
    ).spans
    assert spans.grid == (2, 4)
    assert spans.subject_index().tolist() == [0, 1, 4, 5]
    assert spans.query_index(10).tolist() == [12, 13, 16, 17]


def test_several_subjects():
    canvas = build_incontext_canvas(
        [picture(9, 9), picture(9, 9, 1)], picture(9, 9), hole(9, 9, (2, 2, 5, 5)), size=(32, 48)
    )
    assert canvas.spans.grid == (6, 3)
    assert canvas.spans.subject_index() == slice(0, 12)
    assert canvas.spans.query_index() == slice(12, 18)


def test_what_is_cut_out_becomes_ground():
    subject = Image.new("RGBA", (20, 10), (200, 0, 0, 255))
    subject.paste((0, 0, 0, 0), (0, 0, 10, 10))
    for background, colour in (("white", (255, 255, 255)), ("gray", (128, 128, 128)), ((1, 2, 3), (1, 2, 3))):
        image = build_incontext_canvas(
            subject, picture(8, 8), hole(8, 8, (1, 1, 4, 4)), size=32, background=background
        ).image
        assert image.getpixel((4, 16)) == colour
        assert image.getpixel((28, 16)) == (200, 0, 0)
        assert image.getpixel((16, 2)) == colour  # proportions are kept
    by_mask = build_incontext_canvas(
        Image.new("RGB", (20, 10), (200, 0, 0)), picture(8, 8), hole(8, 8, (1, 1, 4, 4)), size=32,
        subject_mask=hole(20, 10, (10, 0, 20, 10)),
    )  # fmt: skip
    assert by_mask.image.getpixel((4, 16)) == (255, 255, 255)
    blurred = build_incontext_canvas(
        Image.new("RGB", (20, 10), (200, 0, 0)), picture(8, 8), hole(8, 8, (1, 1, 4, 4)), size=32, background="blur"
    )
    assert blurred.image.getpixel((16, 2)) == (200, 0, 0)


@pytest.mark.parametrize("crop", [None, 1.5])
@pytest.mark.parametrize("feather", [0, 3])
def test_what_is_far_from_the_hole_comes_back_bit_for_bit(crop, feather):
    target = picture(90, 60)
    box = (30, 20, 60, 50)
    canvas = build_incontext_canvas(picture(9, 9), target, hole(90, 60, box), size=(32, 64), crop=crop)
    made = np.asarray(stitch(canvas, Image.new("RGB", canvas.image.size, (7, 8, 9)), feather))
    near = hole(90, 60, (box[0] - feather, box[1] - feather, box[2] + feather, box[3] + feather))
    assert np.array_equal(made[~near], np.asarray(target)[~near])
    assert (made[20:50, 30:60] == (7, 8, 9)).all()
    if feather:
        seam = near & ~hole(90, 60, box)
        assert (made[seam] != np.asarray(target)[seam]).any(-1).mean() > 0.9


def test_crop_is_around_the_hole():
    canvas = build_incontext_canvas(picture(9, 9), picture(90, 60), hole(90, 60, (30, 20, 60, 50)), size=32, crop=2.0)
    assert canvas.crop_box == (15, 5, 75, 60)


def test_bad_canvases():
    good = (picture(9, 9), picture(90, 60), hole(90, 60, (30, 20, 60, 50)))
    for more, words in (
        ({"size": 40}, "multiples of 16"),
        ({"layout": "round"}, "layout='round'"),
        ({"background": "sky"}, "background='sky'"),
        ({"crop": 0.5}, "crop=0.5"),
        ({"subject_mask": [None, None]}, "1 subjects and 2 masks"),
    ):
        with pytest.raises(ValueError, match=words):
            build_incontext_canvas(*good, **{"size": 32, **more})
    with pytest.raises(ValueError, match="hole is empty"):
        build_incontext_canvas(*good[:2], np.zeros((60, 90), bool))
    with pytest.raises(ValueError, match=r"hole is \(90, 60\) \(height, width\)"):
        build_incontext_canvas(*good[:2], np.zeros((90, 60), bool))
    with pytest.raises(TypeError, match="PIL"):
        build_incontext_canvas(torch.zeros(3, 8, 8), *good[1:])


def test_spans_cover_the_canvas():
    with pytest.raises(ValueError, match="2 are left out, 0 are in several"):
        CanvasSpans(grid=(4, 2), subjects=((0, 0, 2, 2),), query=(2, 0, 3, 2))
    with pytest.raises(ValueError, match="does not lie on a grid"):
        CanvasSpans(grid=(4, 2), subjects=((0, 0, 2, 2),), query=(2, 0, 5, 2))
    spans = CanvasSpans(grid=(4, 2), subjects=((0, 0, 2, 2),), query=(2, 0, 4, 2))
    assert CanvasSpans.from_dict(spans.to_dict()) == spans


def test_settings():
    config = ContextBrushConfig(blocks=("single",), feather=None)
    assert ContextBrushConfig.from_dict(config.to_dict()) == config
    for bad in ({"shift_image": -0.1}, {"start": 0.6, "stop": 0.5}, {"feather": -1}, {"blocks": ("triple",)}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ContextBrushConfig(**bad)
