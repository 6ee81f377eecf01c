"""Pictures are whole or not there, and what strangers send is taken or refused with a reason."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from eff_studio.store import Pictures, Rejected, read_settings
from eff_studio.store.pictures import KEY, read_picture
from PIL import Image, PngImagePlugin


@pytest.fixture
def pictures(tmp_path):
    return Pictures(tmp_path / "pictures")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side):
    """A small file that says it has side * side points."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def with_text(text, key=KEY):
    info = PngImagePlugin.PngInfo()
    info.add_itxt(key, text)
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, format="PNG", pnginfo=info)
    return out.getvalue()


def test_settings_are_inside(pictures):
    settings = {"kind": "generate", "settings": {"prompt": "a \u2603"}}
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    name = pictures.add(image, settings)
    assert np.array_equal(np.array(pictures.open(name)), np.array(image))
    assert read_settings(pictures.path(name).read_bytes()) == settings
    pictures.remove(name)
    assert pictures.path(name) is None


def test_a_picture_that_was_being_written_is_gone(tmp_path, monkeypatch):
    pictures = Pictures(tmp_path)
    monkeypatch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        pictures.add(Image.new("RGB", (4, 4)))
    assert not list(tmp_path.glob("*.png"))
    Pictures(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "..", "../../etc/passwd", "a" * 31, "A" * 32, "g" * 32, "a" * 32 + "\n", "%2e"])
def test_ids_are_no_paths(pictures, name):
    (pictures.folder.parent / "secret.png").write_bytes(b"x")
    assert pictures.path(name) is None
    pictures.remove(name)
    with pytest.raises(ValueError, match="there is no picture"):
        pictures.open(name)


@pytest.mark.parametrize("side", [5000, 10_000, 20_000, 2**31 - 1])
@pytest.mark.parametrize("read", [read_picture, read_settings])
def test_bombs_are_refused_by_their_header(read, side):
    with pytest.raises(Rejected):
        read(bomb(side))


def test_what_is_taken(pictures, png):
    for format_ in ("PNG", "JPEG", "WEBP"):
        out = io.BytesIO()
        Image.new("RGB", (4, 6), "red").save(out, format=format_)
        assert pictures.open(pictures.add(read_picture(out.getvalue()))).size == (4, 6)
    assert read_picture(png(mode="RGBA")).mode == "RGBA"
    assert read_picture(png(mode="L")).mode == "RGB"
    turned = Image.new("RGB", (4, 6))
    exif = turned.getexif()
    exif[0x0112] = 6  # lying on its side
    out = io.BytesIO()
    turned.save(out, format="JPEG", exif=exif)
    assert read_picture(out.getvalue()).size == (6, 4)


def test_what_is_refused(png):
    moving, gif = io.BytesIO(), io.BytesIO()
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    frames[0].save(moving, format="WEBP", save_all=True, append_images=frames[1:])
    frames[0].save(gif, format="GIF")
    for data, words in [
        (b"", "not a complete"),
        (b"<svg/>", "not a complete"),
        (png(64, 64)[:-200], "not a complete"),
        (gif.getvalue(), "not a complete"),
        (moving.getvalue(), "moves"),
    ]:
        with pytest.raises(Rejected, match=words):
            read_picture(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"nonsense", "not a complete"),
        (with_text("{}", key="other"), "holds no settings"),
        (with_text("{"), "not JSON"),
        (with_text("[" * 30_000), "not JSON"),
        (with_text("[1]"), "not those of the studio"),
        (with_text('{"settings": 3}'), "not those of the studio"),
        (with_text(json.dumps({"settings": {"prompt": "x" * 70_000}})), "at most"),
        (with_text("x" * 2_000_000), "."),  # more than Pillow reads
    ],
)
def test_settings_of_strangers(data, words):
    with pytest.raises(Rejected, match=words):
        read_settings(data)
