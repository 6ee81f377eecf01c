"""Several models by name: loaded when asked for, unloaded to make room, waited for, given up."""

import asyncio
import gc
import threading
import weakref
from contextlib import ExitStack

import pytest
from eff_http import ApiError
from eff_serve.api import Settings
from eff_serve.api.app import create_models_app
from eff_serve.api.metrics import Families
from eff_serve.api.models import Models
from eff_serve.api.serving import Loaded, Serving
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient


class FakeSource:
    """Gives a fake engine of ``memory`` bytes; ``gate`` holds the load up, ``error`` lets it fail."""

    def __init__(self, name, engine_class, tokenizer, memory=40, expected=None):
        self.name, self._class, self._tokenizer = name, engine_class, tokenizer
        self.memory, self.expected = memory, expected
        self.gate, self.begun = threading.Event(), threading.Event()
        self.gate.set()
        self.error, self.engines, self.looks, self.loads, self.stopped = None, weakref.WeakSet(), 0, 0, 0

    def expected_memory(self):
        self.looks += 1
        if isinstance(self.expected, Exception):
            raise self.expected
        return self.memory if self.expected is None else self.expected

    def load(self):
        self.loads += 1
        self.begun.set()
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        engine = self._class()
        engine.text = f"I am {self.name}"
        source, stop = self, engine.stop

        def counted(grace):
            source.stopped += 1
            stop(grace)

        engine.stop = counted
        self.engines.add(engine)
        settings = Settings(model_id=self.name, family="fake", quantization="int8", weight_bytes=self.memory)
        return Loaded(engine, self._tokenizer, settings, self.memory)


@pytest.fixture
def make_models(engine, tokenizer):
    """``make_models(a=40, b=40, limit=100)``: models, and their sources as ``sources``."""

    def make(limit=None, timeout=20.0, **memory):
        families, sources = Families(), {}
        for name, size in memory.items():
            sources[name] = FakeSource(name, type(engine), tokenizer, size)
        servings = [
            Serving(None, None, Settings(model_id=name), source=source, families=families)
            for name, source in sources.items()
        ]
        models = Models(servings, memory_limit=limit, load_timeout=timeout)
        models.sources = sources
        return models

    return make


@pytest.fixture
def client_of():
    return lambda models: TestClient(create_models_app(models, models.default.settings), raise_server_exceptions=False)


def ask(client, model, **fields):
    return client.post("/v1/completions", json={"model": model, "prompt": "hi", **fields})


def states(client):
    return {m["id"]: m["state"] for m in client.get("/v1/models").json()["data"]}


def loaded(models):
    return {s.settings.model_id for s in models.all if s.state == "ready"}


def test_a_model_is_loaded_for_its_first_request(make_models, client_of):
    models = make_models(a=40, b=50)
    client = client_of(models)
    assert client.get("/health").status_code == 200
    assert states(client) == {"a": "unloaded", "b": "unloaded"}
    assert client.get("/v1/models/b").json()["max_model_len"] is None
    assert client.get("/api/ps").json() == {"models": []}
    assert ask(client, "b").json()["choices"][0]["text"] == "I am b"
    assert ask(client, "b").json()["model"] == "b"
    assert states(client) == {"a": "unloaded", "b": "ready"}
    assert client.get("/v1/models/b").json()["max_model_len"] == 500
    assert client.get("/v1/models/b").json()["quantization"] == "int8"
    assert [(m["name"], m["size"]) for m in client.get("/api/ps").json()["models"]] == [("b", 50)]
    assert [m["name"] for m in client.get("/api/tags").json()["models"]] == ["a", "b"]
    assert models.sources["b"].loads == 1
    assert ask(client, None).json()["choices"][0]["text"] == "I am a"  # the first is the one without a name


def test_all_endpoints_load_what_they_name(make_models, client_of):
    models = make_models(a=40, b=50, c=1, d=1, e=1, f=1)
    client = client_of(models)
    chat = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    assert client.post("/v1/chat/completions", json={"model": "a", **chat}).text.endswith("data: [DONE]\n\n")
    assert client.post("/tokenize", json={"model": "b", "prompt": "x"}).json()["count"] == 1
    assert client.post("/v1/responses", json={"model": "c", "input": "hi"}).status_code == 200
    assert client.post("/api/generate", json={"model": "d:latest", "prompt": "hi", "stream": False}).status_code == 200
    assert client.post("/api/show", json={"model": "e"}).status_code == 200
    assert client.post("/detokenize", json={"model": "f", "tokens": [65]}).json() == {"prompt": "A"}
    assert set(states(client).values()) == {"ready"}
    assert all(s.holders == 0 for s in models.all)


def test_unknown_names_are_404(make_models, client_of):
    client = client_of(make_models(a=40, b=50))
    response = ask(client, "c")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert "use 'a', 'b'" in response.json()["error"]["message"]
    assert client.get("/v1/models/c").status_code == 404
    assert states(client) == {"a": "unloaded", "b": "unloaded"}


def test_the_one_used_longest_ago_makes_room(make_models, client_of):
    models = make_models(limit=100, a=40, b=40, c=40)
    client = client_of(models)
    for name, wanted in (("a", "a"), ("b", "ab"), ("a", "ab"), ("c", "ac"), ("c", "ac"), ("b", "bc"), ("a", "ab")):
        assert ask(client, name).status_code == 200
        assert loaded(models) == set(wanted), name
        assert models.memory <= 100
    assert models.sources["b"].stopped == 1
    gc.collect()
    assert not models.sources["c"].engines  # nothing holds an engine that was unloaded


def test_metrics_tell_each_model_apart(make_models, client_of):
    models = make_models(limit=50, a=40, b=50)
    client = client_of(models)
    ask(client, "a")
    ask(client, "b")
    found = {
        (s.name, s.labels.get("model_name")): s.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for s in family.samples
        if s.labels.get("finished_reason") in (None, "stop")
    }
    assert [found["eff_model_loaded", m] for m in "ab"] == [0, 1]
    assert [found["eff_model_memory_bytes", m] for m in "ab"] == [0, 50]
    assert [found["eff_max_model_len", m] for m in "ab"] == [0, 500]
    assert [found["eff_model_loads_total", m] for m in "ab"] == [1, 1]
    assert [found["eff_request_success_total", m] for m in "ab"] == [1, 1]
    assert [found["eff_num_requests_running", m] for m in "ab"] == [0, 0]


def test_a_model_that_cannot_be_loaded_is_tried_again(make_models, client_of):
    models = make_models(a=40)
    client, source = client_of(models), models.sources["a"]
    source.error = ValueError("a secret path is damaged")
    response = ask(client, "a")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "model_failed")
    assert "secret" not in response.text
    assert states(client) == {"a": "unloaded"}
    source.error = None
    assert ask(client, "a").status_code == 200
    assert source.looks == 0  # nobody asked how large it is


def test_a_model_whose_files_cannot_be_read_is_tried_again(make_models, client_of):
    models = make_models(limit=100, a=40)
    client, source = client_of(models), models.sources["a"]
    source.expected = FileNotFoundError("a secret path is gone")
    response = ask(client, "a")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "model_failed")
    assert "secret" not in response.text
    assert states(client) == {"a": "unloaded"}
    source.expected = None
    assert ask(client, "a").status_code == 200


def test_a_model_above_the_limit_is_refused(make_models, client_of):
    models = make_models(limit=100, a=40, b=140)
    client = client_of(models)
    ask(client, "a")
    response = ask(client, "b")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "model_too_large")
    assert models.sources["b"].loads == 0
    assert loaded(models) == {"a"}
    models.sources["b"].expected = 50  # files that promise less than it takes
    assert ask(client, "b").json()["error"]["code"] == "model_too_large"
    assert models.sources["b"].loads == 1
    assert models.sources["b"].stopped == 1
    assert models.memory <= 100


def test_ollama_unloads_at_once(make_models, client_of):
    models = make_models(a=40)
    client = client_of(models)
    ask(client, "a")
    response = client.post("/api/chat", json={"model": "a", "messages": [], "keep_alive": 0})
    assert response.json()["done_reason"] == "unload"
    assert states(client) == {"a": "unloaded"}
    assert client.post("/api/generate", json={"model": "a"}).json()["done_reason"] == "load"
    assert states(client) == {"a": "ready"}


async def held(models, name):
    """A request that has a model: what it closes at its end."""
    stack = ExitStack()
    await models.hold(models.find(name), stack)
    return stack


async def settle():
    for _ in range(20):
        await asyncio.sleep(0.005)


def test_requests_that_come_while_a_model_loads_share_one_load(make_models):
    models = make_models(a=40)

    async def main():
        models.sources["a"].gate.clear()
        waiting = [asyncio.create_task(held(models, "a")) for _ in range(5)]
        await settle()
        assert models.find("a").state == "loading"
        assert not any(t.done() for t in waiting)
        models.sources["a"].gate.set()
        for stack in await asyncio.gather(*waiting):
            stack.close()

    asyncio.run(main())
    assert models.sources["a"].loads == 1
    assert models.find("a").holders == 0


def test_busy_models_stay_and_cannot_keep_another_one_out(make_models):
    models = make_models(limit=50, a=40, b=40)

    async def main():
        first = await held(models, "a")
        second = asyncio.create_task(held(models, "b"))
        await settle()
        assert loaded(models) == {"a"}
        third = asyncio.create_task(held(models, "a"))  # comes while b waits for room
        await settle()
        assert not second.done()
        assert not third.done()
        first.close()
        (await second).close()
        (await third).close()

    asyncio.run(main())
    assert models.sources["a"].loads == 2
    assert models.sources["b"].loads == 1


def test_a_request_gives_up_waiting(make_models):
    models = make_models(limit=50, timeout=0.1, a=40, b=40)

    async def main():
        first = await held(models, "a")
        stack = ExitStack()
        with stack, pytest.raises(ApiError, match="not loaded within"):
            await models.hold(models.find("b"), stack)
        await settle()
        first.close()
        await settle()
        assert models.find("b").bringing is None  # nobody waits for it: it is not loaded after all
        (await held(models, "a")).close()

    asyncio.run(main())
    assert models.sources["b"].loads == 0
    assert models.sources["a"].loads == 1


def test_a_client_that_leaves_while_its_model_loads(make_models):
    models = make_models(a=40)
    app = create_models_app(models, models.default.settings)
    source = models.sources["a"]
    source.gate.clear()
    body = b'{"model": "a", "prompt": "hi"}'

    async def main():
        messages = [{"type": "http.request", "body": body}]
        sent = []

        async def receive():
            if messages:
                return messages.pop()
            while not source.begun.is_set():
                await asyncio.sleep(0.005)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"", "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
            "server": ("test", 80), "client": None, "root_path": "",
        }  # fmt: skip
        await app(scope, receive, send)
        assert sent[0]["status"] == 499
        assert models.find("a").holders == 0
        source.gate.set()
        (await held(models, "a")).close()

    asyncio.run(main())
    assert source.loads == 1


def test_the_end_of_the_server_ends_waiting(make_models):
    models = make_models(a=40)

    async def main():
        models.sources["a"].gate.clear()
        waiting = asyncio.create_task(held(models, "a"))
        await settle()
        models.drain()
        models.sources["a"].gate.set()
        (await waiting).close()
        with pytest.raises(ApiError, match="shutting down"):
            models.check()
        with pytest.raises(ApiError, match="shutting down"):
            models.find("a").admit()

    asyncio.run(main())
    assert models.sources["a"].stopped == 1
