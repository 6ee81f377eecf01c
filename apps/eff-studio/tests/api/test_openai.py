"""OpenAI's own client."""

import asyncio
import base64
import io

import httpx
import openai
import pytest
from eff_studio.engine import Result
from PIL import Image


@pytest.fixture
def ask(client):
    """``ask(lambda api: api.images.generate(...))`` with OpenAI's client on the app."""

    def run(call):
        async def go():
            transport = httpx.ASGITransport(app=client.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://studio") as http:
                api = openai.AsyncOpenAI(base_url="http://studio/v1", api_key="x", http_client=http, max_retries=0)
                return await call(api)

        return asyncio.run(go())

    return run


def pictures(answer):
    return [Image.open(io.BytesIO(base64.b64decode(d.b64_json))) for d in answer.data]


def test_generate(ask, worker):
    answer = ask(
        lambda api: api.images.generate(
            prompt="x", n=2, size="64x64", model="noise", extra_body={"eff": {"seed": 4, "steps": 2}}
        )
    )
    found = pictures(answer)
    assert [p.size for p in found] == [(64, 64)] * 2
    assert found[0].tobytes() != found[1].tobytes()
    job = worker.jobs.latest(1)[0]
    assert (job.work.seed, job.work.steps, job.work.count) == (4, 2, 2)


def test_generate_gives_addresses(ask, client):
    answer = ask(lambda api: api.images.generate(prompt="x", response_format="url", extra_body={"eff": {"steps": 1}}))
    path = answer.data[0].url.removeprefix("http://studio")
    assert client.get(path).headers["content-type"] == "image/png"


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"model": "dall-e-3"}, openai.NotFoundError),
        ({"size": "big"}, openai.BadRequestError),
        ({"size": "128x128"}, openai.BadRequestError),  # the model has one size
        ({"n": 99}, openai.BadRequestError),
        ({"prompt": "boom"}, openai.InternalServerError),
        ({"extra_body": {"eff": {"count": 2}}}, openai.BadRequestError),
        ({"extra_body": {"eff": {"future": 2}}}, openai.BadRequestError),
        ({"extra_body": {"future": 2}}, openai.BadRequestError),
        ({"output_format": "webp"}, openai.BadRequestError),
    ],
)
def test_errors_of_generate(ask, values, error):
    with pytest.raises(error) as caught:
        ask(lambda api: api.images.generate(**{"prompt": "x", **values}))
    assert caught.value.body["message"]


def test_models(ask):
    assert [m.id for m in ask(lambda api: api.models.list()).data] == ["noise"]


@pytest.fixture
def inserted(monkeypatch, worker):
    """Instead of painting, tells what would be: the work and its pictures."""
    seen = []

    def run(work, *, open_picture, **more):
        seen.append((work, *(open_picture(getattr(work, name)) for name in ("target", "subject", "mask"))))
        return Result(images=[Image.new("RGB", (8, 8))])

    monkeypatch.setattr(worker, "_run", run)
    return seen


def test_edit(ask, png, inserted):
    hole = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    hole.paste((0, 0, 0, 0), (2, 2, 5, 5))
    out = io.BytesIO()
    hole.save(out, format="PNG")
    files = [("scene.png", png(8, 8, value="red")), ("dog.png", png(6, 6, value="blue"))]
    answer = ask(
        lambda api: api.images.edit(
            image=files, mask=("mask.png", out.getvalue()), prompt="a dog", extra_body={"seed": 3, "strength": 0.5}
        )
    )
    assert pictures(answer)[0].size == (8, 8)
    work, target, subject, mask = inserted[0]
    assert (work.prompt, work.seed, work.strength) == ("a dog", 3, 0.5)
    assert target.getpixel((0, 0)) == (255, 0, 0)
    assert subject.size == (6, 6)
    assert (mask.getpixel((3, 3)), mask.getpixel((0, 0))) == (255, 0)


@pytest.mark.parametrize(
    ("files", "values", "words"),
    [
        (("image",), {}, "1 images and 0 masks"),
        (("image", "image", "mask"), {"future": "1"}, "future"),
        (("image", "image", "mask"), {"seed": "x"}, "not a number"),
        (("image", "image", "mask"), {"strength": "2"}, "strength"),
        (("image", "image", "mask"), {"guidance": "nan"}, "guidance"),
        (("image", "image", "mask"), {"n": "2"}, "one picture"),
        (("image", "image", "mask"), {"response_format": "x"}, "response_format"),
        (("image", "image", "mask", "prompt"), {}, "prompt must not be a file"),
        (("image", "image", "bad"), {}, "not a complete"),
        (("image", "image", "small"), {}, "differ in size"),
    ],
)
def test_errors_of_edit(client, png, files, values, words):
    data = {"small": png(4, 4), "bad": b"x"}
    names = {"small": "mask", "bad": "mask"}
    parts = [(names.get(name, name), (f"{name}.png", data.get(name, png(8, 8)))) for name in files]
    answer = client.post("/v1/images/edits", files=parts, data=values)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]


def test_edits_that_are_no_form(client):
    assert client.post("/v1/images/edits", json={}).status_code == 400
    head = {"content-type": "multipart/form-data"}
    assert client.post("/v1/images/edits", content=b"x", headers=head).status_code == 400
    head = {"content-type": "multipart/form-data; boundary=a"}
    assert client.post("/v1/images/edits", content=b"--b\r\nnonsense", headers=head).status_code == 400
    text = client.post("/v1/images/edits", files={"x": ("x", b"x")}, data={"image": "text"})
    assert "must be a file" in text.json()["error"]["message"]


def test_a_client_that_leaves_cancels(client, worker, settle):
    worker.model.pipe.gate.clear()

    async def leave():
        transport = httpx.ASGITransport(app=client.app)
        body = b'{"prompt": "x"}'
        messages = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]
        sent = []

        async def receive():
            if len(messages) == 1:
                while not worker.running:
                    await asyncio.sleep(0.01)
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/v1/images/generations", "raw_path": b"", "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"x")], "http_version": "1.1",
            "scheme": "http", "server": ("x", 80), "client": ("y", 1), "root_path": "", "asgi": {"version": "3.0"},
        }  # fmt: skip
        await transport.app(scope, receive, send)

    asyncio.run(leave())
    worker.model.pipe.gate.set()
    settle(lambda: worker.jobs.latest(1)[0].state == "cancelled")
