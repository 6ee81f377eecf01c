import pytest


@pytest.fixture
def adapted(engine):
    engine.adapters = ("polite", "short")
    return engine


def test_the_name_of_the_model_chooses(client, adapted):
    base = client.get("/v1/models").json()["data"][0]["id"]
    names = [card["id"] for card in client.get("/v1/models").json()["data"]]
    assert names == [base, f"{base}:polite", f"{base}:short"]
    assert client.get(f"/v1/models/{base}:short").json()["id"] == f"{base}:short"
    body = {"messages": [{"role": "user", "content": "hi"}]}
    for model, wanted in ((base, None), (f"{base}:polite", "polite"), (f"{base}:short", "short")):
        answer = client.post("/v1/chat/completions", json={**body, "model": model})
        assert answer.status_code == 200
        assert answer.json()["model"] == model
        assert adapted.submitted[-1][1].adapter == wanted
        assert client.post("/v1/completions", json={"prompt": "hi", "model": model}).status_code == 200
        assert adapted.submitted[-1][1].adapter == wanted


@pytest.mark.parametrize("name", ["{}:other", "other:polite", ":polite", "{}:"])
def test_others_are_not_served(client, adapted, name):
    base = client.get("/v1/models").json()["data"][0]["id"]
    answer = client.post("/v1/completions", json={"prompt": "hi", "model": name.format(base)})
    assert answer.status_code == 404
    assert "polite" in answer.json()["error"]["message"]


def test_without_adapters_names_are_as_before(client, engine):
    base = client.get("/v1/models").json()["data"][0]["id"]
    assert client.post("/v1/completions", json={"prompt": "hi", "model": f"{base}:polite"}).status_code == 404
    assert client.post("/v1/completions", json={"prompt": "hi", "model": base}).status_code == 200
    assert engine.submitted[-1][1].adapter is None


class Shelf:
    """What the engine does with adapters, remembered."""

    def __init__(self, engine):
        self.engine, self.calls, self.error = engine, [], None
        engine.adapters, engine.load_adapter, engine.unload_adapter = ("polite",), self.load, self.unload

    def load(self, name, folder, *, replace=False):
        if self.error is not None:
            raise self.error
        self.calls.append((name, folder, replace))
        self.engine.adapters = tuple(dict.fromkeys((*self.engine.adapters, name)))

    def unload(self, name):
        self.engine.adapters = tuple(n for n in self.engine.adapters if n != name)


@pytest.fixture
def shelf(engine):
    return Shelf(engine)


@pytest.fixture
def open_client(make_client, tmp_path):
    (tmp_path / "root" / "short").mkdir(parents=True)
    return make_client(adapter_root=tmp_path / "root")


def test_adapters_come_and_go(open_client, shelf, tmp_path):
    client = open_client
    base = client.get("/v1/models").json()["data"][0]["id"]
    answer = client.post("/v1/load_lora_adapter", json={"lora_name": "short", "lora_path": "short"})
    assert answer.status_code == 200
    assert answer.json() == {"id": f"{base}:short", "status": "loaded"}
    assert shelf.calls == [("short", tmp_path / "root" / "short", False)]
    assert [c["id"] for c in client.get("/v1/models").json()["data"]] == [base, f"{base}:polite", f"{base}:short"]
    whole = str(tmp_path / "root" / "short")
    again = {"lora_name": "short", "lora_path": whole}
    refused = client.post("/v1/load_lora_adapter", json=again)
    assert refused.status_code == 400
    assert "already" in refused.json()["error"]["message"]
    assert client.post("/v1/load_lora_adapter", json={**again, "load_inplace": True}).status_code == 200
    assert shelf.calls[-1][2]
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "short"}).json()["status"] == "unloaded"
    assert client.post("/v1/completions", json={"prompt": "hi", "model": f"{base}:short"}).status_code == 404
    gone = client.post("/v1/unload_lora_adapter", json={"lora_name": "short"})
    assert gone.status_code == 404
    assert gone.json()["error"]["param"] == "lora_name"


@pytest.mark.parametrize("path", ["..", ".", "../root2/x", "/etc", "link", "\0"])
def test_nothing_outside_of_the_root_is_read(open_client, shelf, tmp_path, path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    answer = open_client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "lora_path"
    assert shelf.calls == []


def test_reasons_do_not_tell_where_the_root_lies(open_client, shelf, tmp_path):
    body = {"lora_name": "x", "lora_path": "short"}
    for error, status in ((FileNotFoundError, 404), (ValueError, 400)):
        shelf.error = error(f"{tmp_path / 'root' / 'short'} has no adapter_config.json")
        answer = open_client.post("/v1/load_lora_adapter", json=body)
        assert answer.status_code == status
        assert answer.json()["error"]["message"] == "short has no adapter_config.json"


@pytest.mark.parametrize("body", [{"lora_name": "a b"}, {"lora_name": "x", "lora_int_id": 1}, {}, {"lora_name": 1}])
def test_fields_are_checked(open_client, shelf, body):
    assert open_client.post("/v1/load_lora_adapter", json={"lora_path": "short", **body}).status_code == 400
    assert open_client.post("/v1/unload_lora_adapter", json=body).status_code in (400, 404)


def test_without_a_root_there_are_no_such_endpoints(client, shelf):
    for name in ("load", "unload"):
        assert client.post(f"/v1/{name}_lora_adapter", json={"lora_name": "x", "lora_path": "x"}).status_code == 404
    assert shelf.calls == []


def test_a_key_is_asked_for(make_client, shelf, tmp_path):
    client = make_client(adapter_root=tmp_path, api_keys=("secret",))
    body = {"lora_name": "polite"}
    assert client.post("/v1/unload_lora_adapter", json=body).status_code == 401
    assert shelf.engine.adapters == ("polite",)
    key = {"Authorization": "Bearer secret"}
    assert client.post("/v1/unload_lora_adapter", json=body, headers=key).status_code == 200
