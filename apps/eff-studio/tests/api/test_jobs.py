"""Jobs over HTTP."""

import json
import threading

import pytest


def events(answer):
    parts = [part.removeprefix("data: ") for part in answer.text.split("\n\n") if part]
    assert parts[-1] == "[DONE]"
    return [json.loads(part) for part in parts[:-1]]


def test_a_job_from_begin_to_end(client, submit, done):
    job = submit(seed=3, count=2)
    assert job["settings"]["seed"] == 3
    assert job["settings"]["guidance"] == 4.0  # what was left out is told
    found = done(job)
    assert found["state"] == "done"
    assert len(found["pictures"]) == 2
    picture = client.get(f"/api/pictures/{found['pictures'][0]}.png")
    assert picture.headers["content-type"] == "image/png"
    read = client.post("/api/settings", content=picture.content).json()
    assert read == {"kind": "generate", "settings": job["settings"]}
    assert client.get("/api/jobs").json()["jobs"] == [found]
    assert client.get(f"/api/jobs?before={found['created']}").json()["jobs"] == []
    assert client.delete(f"/api/jobs/{job['id']}").status_code == 204
    assert client.get(f"/api/jobs/{job['id']}").status_code == 404
    assert client.get(f"/api/pictures/{found['pictures'][0]}.png").status_code == 404


def test_events_tell_progress_and_the_end(client, submit, worker, settle):
    worker.model.pipe.gate.clear()
    job = submit(steps=3)

    def open_gate():
        settle(lambda: worker._listeners.get(job["id"]))
        worker.model.pipe.gate.set()

    thread = threading.Thread(target=open_gate)
    thread.start()
    found = events(client.get(f"/api/jobs/{job['id']}/events"))
    thread.join()
    steps = [e["step"] for e in found if e["type"] == "progress"]
    assert steps == sorted(steps)
    assert found[-1]["state"] == "done"
    assert len(found[-1]["pictures"]) == 1
    assert not worker._listeners  # nothing is left of the stream
    again = events(client.get(f"/api/jobs/{job['id']}/events"))  # of a job that has ended: the end alone
    assert again == [found[-1]]
    assert client.get("/api/jobs/nonsense/events").status_code == 404


def test_events_end_when_the_server_does(client, submit, worker, settle):
    worker.model.pipe.gate.clear()
    submit()
    job = submit()

    def stop():
        settle(lambda: worker._listeners.get(job["id"]))
        threading.Timer(0.2, worker.model.pipe.gate.set).start()
        worker.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    text = client.get(f"/api/jobs/{job['id']}/events").text
    thread.join()
    assert json.loads(text.strip().rsplit("data: ", 1)[1])["error"]["code"] == "draining"
    health = client.get("/health")
    assert health.status_code == 500  # nothing draws any more
    assert "thread" in health.json()["error"]["message"]


def test_cancel_and_forget(client, submit, worker, done, settle):
    worker.model.pipe.gate.clear()
    running = submit()
    settle(lambda: running["id"] in worker.running)
    waiting = submit()
    assert waiting["ahead"] == 1
    assert client.post(f"/api/jobs/{waiting['id']}/cancel").json()["state"] == "cancelled"
    client.post(f"/api/jobs/{running['id']}/cancel")
    worker.model.pipe.gate.set()
    assert done(running)["state"] == "cancelled"
    assert client.post(f"/api/jobs/{running['id']}/cancel").json()["state"] == "cancelled"
    assert client.post("/api/jobs/nonsense/cancel").status_code == 404
    worker.model.pipe.gate.clear()
    running = submit()
    settle(lambda: running["id"] in worker.running)
    threading.Timer(0.2, worker.model.pipe.gate.set).start()
    assert client.delete(f"/api/jobs/{running['id']}").status_code == 204  # ended first, then forgotten
    assert client.get(f"/api/jobs/{running['id']}").status_code == 404


def test_a_full_line_is_429(make_client, worker, settle):
    client = make_client(max_waiting=2)
    worker.model.pipe.gate.clear()
    body = {"kind": "generate", "settings": {"prompt": "x", "steps": 1}}
    client.post("/api/jobs", json=body)
    settle(lambda: worker.running)
    answers = [client.post("/api/jobs", json=body) for _ in range(3)]
    assert [a.status_code for a in answers] == [201, 201, 429]
    assert answers[-1].json()["error"]["code"] == "queue_full"
    assert int(answers[-1].headers["retry-after"]) > 0
    assert client.post("/v1/images/generations", json={"prompt": "x"}).status_code == 429


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"kind": "paint", "settings": {}}, "generate, insert, segment"),
        ({"kind": "generate", "settings": {"prompt": "x", "steps": 0}}, "steps=0"),
        ({"kind": "generate", "settings": {"prompt": "x", "seed": "1"}}, "seed"),
        ({"kind": "generate", "settings": {"prompt": "x", "future": 1}}, "future"),
        ({"kind": "generate", "settings": {"prompt": "x"}, "more": 1}, "more"),
        ({"kind": "generate"}, "settings"),
        ({"kind": "segment", "settings": {"picture": "0" * 32, "phrase": "x"}}, "send it to /api/pictures"),
        ({"kind": "segment", "settings": {"picture": "../../x", "phrase": "x"}}, "there is no picture"),
        ({"kind": "insert", "settings": {"subject": "a", "target": "b", "mask": "c"}}, "there is no picture"),
    ],
)
def test_wrong_jobs_are_400(client, worker, body, words):
    answer = client.post("/api/jobs", json=body)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]
    assert worker.jobs.latest(1) == []


def test_wrong_queries(client):
    for query in ("count=0", "count=201", "count=x", "before=x"):
        assert client.get(f"/api/jobs?{query}").status_code == 400, query
    for path in ("/api/jobs/nonsense", f"/api/jobs/{'x' * 5000}", "/api/jobs/..%2f..%2fx"):
        assert client.get(path).status_code == 404, path
    assert client.delete("/api/jobs/nonsense").status_code == 404


def test_the_model_and_its_defaults_can_be_sent_back(client):
    facts = client.get("/api/model").json()
    assert (facts["model"], facts["width"], facts["heads"], facts["resizable"]) == ("noise", 64, [2, 2], False)
    settings = facts["defaults"]["generate"] | {"prompt": "x", "steps": 1}
    assert client.post("/api/jobs", json={"kind": "generate", "settings": settings}).status_code == 201
