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
