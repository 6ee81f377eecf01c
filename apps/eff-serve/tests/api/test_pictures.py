"""Pictures in chat requests: what is taken, what is refused and how, on an engine that only records."""

import base64
import io
import struct
import zlib

import pytest
from eff_serve.api import Settings, create_app
from eff_serve.pictures import PictureError, read_picture
from PIL import Image
from starlette.testclient import TestClient


def data_url(raw, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


RED = encoded(Image.new("RGB", (20, 10), "red"))


def bomb(width, height):
    """A PNG of a few bytes that claims to be of this size."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


class RecordingEyes:
    def __init__(self):
        self.seen = []

    def look(self, prompt, pictures):
        self.seen.append([(picture.size, picture.convert("RGB").getpixel((0, 0))) for picture in pictures])
        return ("pictures", len(pictures))


@pytest.fixture
def eyes():
    return RecordingEyes()


@pytest.fixture
def seeing(engine, tokenizer, eyes):
    """Records what the engine was given, and answers as a client."""
    submitted = []
    take = engine.submit
    engine.submit = lambda prompt, sampling, pictures=None: (submitted.append(pictures), take(prompt, sampling))[1]
    client = TestClient(create_app(engine, tokenizer, Settings(model_id="fake"), eyes), raise_server_exceptions=False)
    client.submitted = submitted
    return client


def turn(*urls, role="user", **more):
    parts = [{"type": "image_url", "image_url": {"url": url, **more}} for url in urls]
    return {"messages": [{"role": role, "content": [*parts, {"type": "text", "text": "What is this?"}]}]}


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_every_format_reaches_the_model(seeing, eyes, form):
    url = data_url(encoded(Image.new("RGB", (20, 10), "red"), form), f"image/{form.lower()}")
    answer = seeing.post("/v1/chat/completions", json=turn(url))
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "Hello"
    ((size, colour),) = eyes.seen[0]
    assert size == (20, 10)
    assert colour[0] > 240
    assert max(colour[1:]) < 15
    assert seeing.submitted == [("pictures", 1)]


def test_pictures_come_in_their_order_and_n_answers_share_them(seeing, eyes):
    blue = data_url(encoded(Image.new("RGB", (4, 4), "blue")))
    answer = seeing.post("/v1/chat/completions", json={**turn(data_url(RED), blue, detail="low"), "n": 2})
    assert answer.status_code == 200
    assert eyes.seen == [[((20, 10), (255, 0, 0)), ((4, 4), (0, 0, 255))]]
    assert seeing.submitted == [("pictures", 2)] * 2


def test_text_alone_never_meets_the_eyes(seeing, eyes):
    assert seeing.post("/v1/chat/completions", json=turn()).status_code == 200
    assert eyes.seen == []
    assert seeing.submitted == [None]


BAD = {
    "remote": ("https://example.com/cat.png", "fetches no address"),
    "file": ("file:///etc/passwd", "fetches no address"),
    "empty": ("", "fetches no address"),
    "no comma": ("data:image/png;base64", "must begin with data:image"),
    "no base64": ("data:image/svg+xml,<svg/>", "must begin with data:image"),
    "bad base64": ("data:image/png;base64,@@@@", "not valid base64"),
    "no data": ("data:image/png;base64,", "not a picture of format PNG, JPEG"),
    "text": (data_url(b"I am no picture, whatever I am called"), "not a picture of format PNG, JPEG"),
    "svg": (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "not a picture of format"),
    "other format": (data_url(encoded(Image.new("RGB", (4, 4)), "BMP")), "not a picture of format"),
    "cut": (data_url(encoded(Image.effect_noise((64, 64), 50))[:-2000]), "damaged"),
    "bomb": (data_url(bomb(8000, 8000)), "8000 x 8000 pixels; the limit is 32,000,000"),
    "huge bomb": (data_url(bomb(60000, 60000)), "pixels; the limit is 32,000,000"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_picture_gets_400_and_loses_nothing(seeing, eyes, case):
    url, words = BAD[case]
    answer = seeing.post("/v1/chat/completions", json=turn(data_url(RED), url))
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert words in error["message"]
    assert error["param"] == "messages[0].content[1].image_url.url"
    assert len(error["message"]) < 300
    assert seeing.submitted == []
    assert seeing.post("/v1/chat/completions", json=turn(data_url(RED))).status_code == 200


@pytest.mark.parametrize(
    ("body", "words", "param"),
    [
        (turn(data_url(RED), role="assistant"), "only for messages of the user", "messages[0].content[0].type"),
        (turn(*[data_url(RED)] * 9), "holds 9 pictures; the limit is 8", "messages"),
        (turn(data_url(RED), detail="high"), "seen at one size", "messages[0].content[0].image_url.detail"),
        (turn(data_url(RED), size=3), "size", "messages[0].content[0].image_url.size"),
    ],
)
def test_requests_that_are_refused(seeing, body, words, param):
    answer = seeing.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param
    assert seeing.submitted == []


def test_a_model_without_eyes_says_so(client, engine):
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = client.post(path, json=turn(data_url(RED)))
        assert answer.status_code == 400
        assert "reads text only" in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "messages[0].content[0].type"
    assert engine.submitted == []


def test_models_say_what_they_read(client, seeing):
    assert client.get("/v1/models").json()["data"][0]["input_modalities"] == ["text"]
    assert seeing.get("/v1/models").json()["data"][0]["input_modalities"] == ["text", "image"]


def test_pictures_are_turned_as_their_camera_says():
    turned = Image.new("RGB", (20, 10), "red")
    turned.getexif()[0x0112] = 6
    assert read_picture(data_url(encoded(turned, exif=turned.getexif()))).size == (10, 20)
    wrapped = "\n".join(base64.b64encode(RED).decode()[i : i + 60] for i in range(0, 2000, 60))
    assert read_picture(f"DATA:image/png;charset=binary;base64,{wrapped}").size == (20, 10)
    with pytest.raises(PictureError, match=r"20 x 10 pixels; the limit is 199"):
        read_picture(data_url(RED), max_pixels=199)
