"""The app around a fake model."""

import pytest
from eff_studio.api import ServerSettings, create_app
from starlette.testclient import TestClient


@pytest.fixture
def make_client(worker):
    """``make_client(**settings)`` is a client of an app with these settings."""

    def make(**settings):
        return TestClient(create_app(worker, ServerSettings(**settings)), raise_server_exceptions=False)

    return make


@pytest.fixture
def client(make_client):
    return make_client()


@pytest.fixture
def submit(client):
    """``submit(**settings)`` puts a picture in line; returns the job."""

    def send(kind="generate", **settings):
        if kind == "generate":
            settings = {"prompt": "x", "steps": 2, **settings}
        answer = client.post("/api/jobs", json={"kind": kind, "settings": settings})
        assert answer.status_code == 201, answer.text
        return answer.json()

    return send


@pytest.fixture
def done(client, settle):
    """``done(job)`` is a job when it has ended."""

    def wait(job):
        def look():
            found = client.get(f"/api/jobs/{job['id']}").json()
            return found if found["state"] in ("done", "failed", "cancelled") else None

        return settle(look)

    return wait
