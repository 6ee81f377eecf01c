"""What stands before and around the endpoints: bodies, keys, states, overload, clients that leave, metrics."""

import asyncio
import json

import pytest
from eff_serve.api import Settings, create_app
from eff_serve.engine.types import DrainingError, QueueFullError, Step
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

GOOD = '{"prompt": "a"}'
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("", "required"),
        ("{", "not JSON"),
        ("[]", ""),
        ("1", ""),
        ('{"prompt": "a", "temperature": NaN}', "NaN"),
        ('{"prompt": "a", "temperature": Infinity}', "Infinity"),
        ('{"prompt": "a", "temperature": 1e999}', "out of range"),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "5000 digits"),
        ('{"prompt": "a", "prompt": "b"}', "twice"),
        ('{"prompt": ' + "[" * 100000 + "}", "levels"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "\xff"}', "UTF-8"),
    ],
)
def test_bad_bodies(client, engine, body, says):
    response = client.post("/v1/completions", content=body, headers=JSON)
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]
    assert engine.submitted == []


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_wrong_content_type(client, kind):
    response = client.post("/v1/completions", content=GOOD, headers={"content-type": kind})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_content_type"


@pytest.mark.parametrize("chunked", [False, True])
def test_body_too_large(make_client, chunked):
    data = b'{"prompt": "' + b"a" * 200 + b'"}'
    content = iter([data[:50], data[50:]]) if chunked else data
    response = make_client(max_body_bytes=100).post("/v1/completions", content=content, headers=JSON)
    assert response.status_code == 413
    assert "100 bytes" in response.json()["error"]["message"]


def asgi(app, body, *, complete=True, leave=None):
    """Send one request; ``leave`` is awaited before the client leaves. Returns the messages of the response."""

    async def talk():
        sent = []
        pending = [{"type": "http.request", "body": body, "more_body": not complete}]

        async def receive():
            if pending:
                return pending.pop()
            if leave is None:
                await asyncio.Event().wait()
            await leave()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": "",
            "headers": [(b"content-type", b"application/json")], "server": ("s", 80), "client": ("c", 1),
        }  # fmt: skip
        await asyncio.wait_for(app(scope, receive, send), 10)
        return sent

    return asyncio.run(talk())


def test_slow_body(engine, tokenizer):
    app = create_app(engine, tokenizer, Settings(model_id="fake", body_timeout=0.05))
    sent = asgi(app, b'{"prompt"', complete=False)
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["code"] == "body_timeout"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slots(engine, tokenizer, stream):
    engine.steps = [Step(token=72), None]
    app = create_app(engine, tokenizer, Settings(model_id="fake"))

    async def leave():
        while not engine.streams:
            await asyncio.sleep(0.001)

    asgi(app, json.dumps({"prompt": "a", "n": 2, "stream": stream}).encode(), leave=leave)
    assert [s.cancelled for s in engine.streams] == [True, True]
    assert engine.stats().running == 0
    found = samples(TestClient(app))
    assert found["eff_client_disconnects_total", "/v1/completions"] == 1
    assert found["eff_request_success_total", "abort"] == 2


def samples(client):
    """Value of each sample by name and its label other than the model's, where it has just one."""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (s.name, *(v for k, v in sorted(s.labels.items()) if k != "model_name")): s.value
        for family in text_string_to_metric_families(response.text)
        for s in family.samples
    }


def test_metrics_count_what_happened(client):
    assert client.post("/v1/completions", json={"prompt": "abc"}).status_code == 200
    client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 2})
    client.post("/v1/completions", json={})
    client.get("/nowhere/1")
    found = samples(client)
    assert found["eff_request_success_total", "stop"] == 1
    assert found["eff_request_success_total", "length"] == 1
    assert found["eff_prompt_tokens_total",] == 6
    assert found["eff_generation_tokens_total",] == 6 + 2
    assert found["eff_time_to_first_token_seconds_count",] == 2
    assert found["eff_inter_token_latency_seconds_count",] == 5 + 1
    assert found["eff_e2e_request_latency_seconds_count",] == 2
    assert found["eff_max_model_len",] == 500
    assert found["eff_num_requests_running",] == 0
    assert found["eff_http_requests_total", "POST", "/v1/completions", "200"] == 2
    assert found["eff_http_requests_total", "POST", "/v1/completions", "400"] == 1
    assert found["eff_http_requests_total", "GET", "unknown", "404"] == 1


def test_full_line(client, engine):
    engine.refusal = QueueFullError(2.2)
    response = client.post("/v1/completions", json={"prompt": "a"})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert response.json()["error"]["code"] == "queue_full"
    assert samples(client)["eff_admission_rejections_total", "queue_full"] == 1


def test_engine_that_stops(client, engine):
    engine.refusal = DrainingError()
    response = client.post("/v1/completions", json={"prompt": "a"})
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1


def test_refusal_of_the_engine(client, engine):
    engine.refusal = ValueError("needs 9 pages, has 8")
    response = client.post("/v1/completions", json={"prompt": "a"})
    assert response.status_code == 400
    assert "needs 9 pages, has 8" in response.json()["error"]["message"]


def test_states(engine, tokenizer):
    app = create_app(None, None, Settings(model_id="fake"))
    client, serving = TestClient(app), app.state.serving

    def statuses():
        post = client.post("/v1/completions", json={"prompt": "a"})
        return client.get("/health").status_code, post.status_code

    assert statuses() == (503, 503)
    assert client.get("/health").json()["error"]["code"] == "loading"
    serving.ready(engine, tokenizer)
    assert statuses() == (200, 200)
    serving.drain()
    assert statuses() == (503, 503)
    assert client.get("/health").json()["error"]["code"] == "draining"
    serving.fail()
    assert client.get("/health").json()["error"]["code"] == "failed"


def test_keys(make_client):
    client = make_client(api_keys=("one", "two"))
    ask = {"json": {"prompt": "a"}}
    for header in (None, "Bearer three", "Bearer ", "Bearer on", "Bearer onee", "one", "Basic one"):
        headers = {} if header is None else {"authorization": header}
        response = client.post("/v1/completions", headers=headers, **ask)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
    for key in ("one", "two"):
        assert client.post("/v1/completions", headers={"authorization": f"Bearer {key}"}, **ask).status_code == 200
    assert client.post("/v1/completions", headers={"authorization": "bearer one"}, **ask).status_code == 200
    assert client.get("/health").status_code == 200
    assert client.head("/health").status_code == 200
    assert client.get("/v1/models").status_code == 401
    assert client.get("/metrics").status_code == 200
    assert make_client(api_keys=("one",), protect_metrics=True).get("/metrics").status_code == 401


def test_every_key_is_compared_in_constant_time(make_client, monkeypatch):
    seen = []
    monkeypatch.setattr("eff_http.gate.secrets.compare_digest", lambda a, b: seen.append(b) or a == b)
    make_client(api_keys=("one", "two")).get("/v1/models", headers={"authorization": "Bearer one"})
    assert seen == [b"one", b"two"]


def test_cors_only_where_allowed(make_client):
    origin = {"origin": "http://a.test"}
    assert "access-control-allow-origin" not in make_client().get("/health", headers=origin).headers
    allowed = make_client(cors_origins=("http://a.test",))
    assert allowed.get("/health", headers=origin).headers["access-control-allow-origin"] == "http://a.test"
    assert "access-control-allow-origin" not in allowed.get("/health", headers={"origin": "http://b.test"}).headers


def test_a_preflight_is_answered(make_client):
    asks = {"origin": "http://a.test", "access-control-request-method": "POST"}
    response = make_client(cors_origins=("http://a.test",)).options("/v1/chat/completions", headers=asks)
    assert response.status_code == 200


def test_a_foreign_host_is_turned_away(make_client):
    client = make_client(hosts=("127.0.0.1", "localhost", "::1"))
    for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "LOCALHOST"):
        assert client.get("/health", headers={"host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example:8000", "", "[::2]"):
        response = client.get("/health", headers={"host": host})
        assert response.status_code == 421
        assert response.json()["error"]["code"] == "wrong_host"


def test_an_unexpected_error_closes_the_connection(client, engine):
    engine.refusal = RuntimeError("boom")
    response = client.post("/v1/completions", json={"prompt": "a"})
    assert response.status_code == 500
    assert response.headers["connection"] == "close"
    assert "boom" not in response.text


def test_tokens_round_trip(client):
    text = "na\u00efve \u20ac"
    tokens = client.post("/tokenize", json={"prompt": text}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(text.encode())
    assert client.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}
    bad = client.post("/detokenize", json={"tokens": [1, 258]})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "tokens[1]")


def test_models(client):
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["fake"]
    assert client.get("/v1/models/fake").json()["max_model_len"] == 500
    assert client.get("/v1/models/other").status_code == 404
