"""Pictures, keys, limits, health, metrics, the page."""

import io
import json

import pytest
from PIL import Image, PngImagePlugin


def picture_with(settings):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("eff-studio", settings if isinstance(settings, str) else json.dumps(settings))
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, format="PNG", pnginfo=info)
    return out.getvalue()


def test_send_and_fetch(client, png):
    answer = client.post("/api/pictures", content=png(5, 7))
    assert answer.status_code == 201
    found = client.get(f"/api/pictures/{answer.json()['id']}.png")
    assert Image.open(io.BytesIO(found.content)).size == (5, 7)
    assert found.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", ["..%2f..%2fstudio", "%2e%2e/studio", "0" * 32, "a%00b", "x" * 9000])
def test_other_files_are_not_fetched(client, name):
    assert client.get(f"/api/pictures/{name}.png").status_code == 404


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"<svg onload='x'/>"])
def test_what_is_no_picture_is_400(client, worker, data):
    for path in ("/api/pictures", "/api/settings"):
        answer = client.post(path, content=data)
        assert answer.status_code == 400
        assert "not a complete" in answer.json()["error"]["message"]
    assert not list(worker.pictures.folder.iterdir())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{", "not JSON"),
        ({"kind": "generate"}, "not those of the studio"),
        ({"kind": "other", "settings": {}}, "wanted one of"),
        ({"settings": {"prompt": "x"}}, "wanted one of"),
        ({"kind": "generate", "settings": {"prompt": "x", "future": 1}}, "future"),
        ({"kind": "generate", "settings": {"prompt": "x", "steps": 10**9}}, "steps="),
        ({"kind": "generate", "settings": {"prompt": "\ud800"}}, "surrogate"),
        ({"kind": "generate", "settings": {"prompt": ["x"]}}, "prompt"),
        ('{"kind": "generate", "settings": {"prompt": "x", "guidance": NaN}}', "guidance"),
    ],
)
def test_settings_of_strangers_are_400(client, settings, words):
    answer = client.post("/api/settings", content=picture_with(settings))
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]


def test_too_large_is_413(make_client, png):
    client = make_client(max_upload_bytes=1000, max_json_bytes=1000)
    assert client.post("/api/pictures", content=b"x" * 1001).status_code == 413
    assert client.post("/api/pictures", content=iter([b"x" * 600] * 3)).status_code == 413  # no length is declared
    assert client.post("/api/settings", content=b"x" * 1001).status_code == 413
    big = {"kind": "generate", "settings": {"prompt": "x" * 1000}}
    assert client.post("/api/jobs", json=big).status_code == 413
    files = {"image": png(64, 64)}
    assert client.post("/v1/images/edits", files=files).status_code == 413


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"kind": NaN}', b'{"kind": "a", "kind": "b"}', b"\xff", b"[" * 9999])
def test_what_is_no_json_is_400(client, body):
    answer = client.post("/api/jobs", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_keys(make_client):
    client = make_client(api_keys=("right",))
    for path in ("/health", "/version", "/", "/static/app.js"):
        assert client.get(path).status_code == 200, path
    closed = ["/api/model", "/api/jobs", f"/api/pictures/{'0' * 32}.png", "/v1/models", "/metrics", "/openapi.json"]
    for path in closed:
        assert client.get(path).status_code == 401, path
        assert client.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401, path
        assert client.get(path, headers={"authorization": "Bearer right"}).status_code in (200, 404), path


def test_other_hosts_are_refused(make_client):
    client = make_client(hosts=("localhost",))
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 421
    assert client.get("/health", headers={"host": "localhost:8100"}).status_code == 200


def test_health_and_jobs_while_draining(client):
    assert client.get("/health").json() == {"status": "ok"}
    client.app.state.studio.draining = True
    assert client.get("/health").status_code == 503
    answer = client.post("/api/jobs", json={"kind": "generate", "settings": {"prompt": "x"}})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "draining"
    assert client.get("/api/jobs").status_code == 200  # looking still works


def test_metrics(client, submit, done):
    done(submit())
    done(submit(prompt="boom"))
    text = client.get("/metrics").text
    for line in (
        'eff_studio_jobs_total{state="done"} 1.0',
        'eff_studio_jobs_total{state="failed"} 1.0',
        "eff_studio_pictures_total 1.0",
        "eff_studio_jobs_waiting 0.0",
        'eff_studio_responses_total{method="POST",path="/api/jobs",status="201"} 2.0',
    ):
        assert line in text, line


def test_the_page(client, make_client):
    page = client.get("/")
    assert "eff studio" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    import re

    for path in re.findall(r'(?:src|href)="(/[^"]+)"', page.text):
        assert client.get(path).status_code == 200, path
    assert client.get("/static/../api/jobs.py").status_code == 404
    assert make_client(page=False).get("/").status_code == 404
