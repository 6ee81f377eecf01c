"""A small app on all parts: bodies, errors, keys, events, pages. What eff-serve tests further is not repeated here."""

import asyncio

import pytest
from eff_http import (
    BodyLimits,
    ClientGoneError,
    EventStream,
    Gate,
    GateRules,
    JsonRoute,
    RequestModel,
    add_error_handlers,
    add_static_page,
    retry_later,
    unless_disconnected,
)
from fastapi import APIRouter, FastAPI
from starlette.testclient import TestClient


class Sum(RequestModel):
    numbers: list[float]


@pytest.fixture
def counted():
    return []


@pytest.fixture
def client(tmp_path, counted):
    (tmp_path / "index.html").write_text("<p>page</p>")
    router = APIRouter(route_class=JsonRoute)

    @router.post("/sum")
    async def add(body: Sum) -> dict[str, float]:
        return {"sum": sum(body.numbers)}

    @router.get("/events/{fails}")
    async def events(fails: int) -> EventStream:
        async def produce(send):
            await send(Sum(numbers=[1]))
            if fails == 1:
                raise retry_later(503, "going down", "draining", 1)
            if fails == 2:
                raise RuntimeError("secret")

        return EventStream(produce, client_gone=lambda: None, close=lambda: counted.append("closed"), headers={})

    app = FastAPI()
    app.state.limits = BodyLimits(max_bytes=60, max_depth=3)
    app.include_router(router)
    add_static_page(app, tmp_path, {"/": "index.html"})
    add_error_handlers(app)
    rules = GateRules(api_keys=("k",), open_paths=("/", "/static/"))
    app.add_middleware(Gate, rules=rules, count=lambda *seen: counted.append(seen))
    return TestClient(app, raise_server_exceptions=False, headers={"authorization": "Bearer k"})


def test_answers_and_counts(client, counted):
    assert client.post("/sum", json={"numbers": [1, 2]}).json() == {"sum": 3.0}
    assert counted == [("POST", "/sum", 200)]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ('{"numbers": [1], "mean": 1}', 400, "mean"),
        ('{"numbers": "1"}', 400, "numbers"),
        ('{"numbers": [1, true]}', 400, "numbers[1]"),
        ("{}", 400, "numbers"),
        ('{"numbers": [[[[1]]]]}', 400, None),
        ('{"numbers": [' + "1, " * 50 + "1]}", 413, None),
    ],
)
def test_refuses(client, body, status, param):
    response = client.post("/sum", content=body, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert response.json()["error"]["param"] == param


def test_a_key_is_asked_for_but_at_open_paths(client):
    client.headers.pop("authorization")
    assert client.get("/").status_code == 200
    assert client.post("/sum", json={"numbers": []}).status_code == 401
    assert client.get("/nowhere").status_code == 401  # "/" is one path, not all of them


def test_the_page_may_call_its_own_server_only(client):
    assert "default-src 'none'" in client.get("/").headers["content-security-policy"]


@pytest.mark.parametrize(("fails", "last"), [(0, "[DONE]"), (1, '"code":"draining"'), (2, '"code":"internal_error"')])
def test_events_end_with_done_or_an_error(client, counted, fails, last):
    text = client.get(f"/events/{fails}").text
    assert last in text.strip().split("\n\n")[-1]
    assert ("[DONE]" in text) == (fails == 0)
    assert "secret" not in text
    assert counted[-1] == "closed"


def test_work_ends_with_its_client():
    ended = []

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def receive():
        return {"type": "http.disconnect"}

    with pytest.raises(ClientGoneError):
        asyncio.run(unless_disconnected(receive, work()))
    assert ended == [True]


@pytest.mark.parametrize("limits", [{"max_bytes": 0}, {"max_seconds": -1.0}, {"max_depth": 0}])
def test_limits_are_positive(limits):
    with pytest.raises(ValueError, match="must be positive"):
        BodyLimits(**limits)


@pytest.mark.parametrize("key", ["", " k", "k\n", "\u00e9"])
def test_keys_are_plain(key):
    with pytest.raises(ValueError, match="API keys"):
        GateRules(api_keys=(key,))
