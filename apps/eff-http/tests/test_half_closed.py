"""Who closes the sending half gets the answer; who leaves ends the work; both over real sockets."""

import asyncio
import importlib
import socket
import threading
from contextlib import contextmanager
from http.client import HTTPResponse
from urllib.parse import urlsplit

import pytest
from eff_http import EventStream, RequestModel, unless_disconnected
from eff_http.half_closed import HalfClosed
from eff_http.testing import served_in_a_thread
from fastapi import FastAPI, Request


class Word(RequestModel):
    text: str


class App:
    """An app whose answers wait until they are let go; says which of its work was cut."""

    def __init__(self):
        self.begun, self.cut, self.go = threading.Event(), threading.Event(), threading.Event()
        self.app = FastAPI()

        async def wait():
            try:
                self.begun.set()
                while not self.go.is_set():
                    await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                self.cut.set()
                raise

        @self.app.post("/")
        async def whole(request: Request) -> dict[str, str]:
            text = (await request.body()).decode()
            await unless_disconnected(request.receive, wait())
            return {"text": text}

        @self.app.post("/events")
        async def events(request: Request) -> EventStream:
            async def produce(send):
                await send(Word(text="one"))
                await wait()

            return EventStream(produce, client_gone=lambda: None, close=lambda: None, headers={})


@pytest.fixture(params=["h11", "httptools"])
def served(request, monkeypatch):
    """The app, served by either of uvicorn's parsers, and its address."""
    pytest.importorskip(request.param)
    base = importlib.import_module(f"uvicorn.protocols.http.{request.param}_impl")
    protocol = base.H11Protocol if request.param == "h11" else base.HttpToolsProtocol
    monkeypatch.setattr("eff_http.testing.HalfClosedProtocol", type("Served", (HalfClosed, protocol), {}))
    app = App()
    with served_in_a_thread(app.app) as address:
        yield app, urlsplit(address)


@contextmanager
def asked(address, path="/", version="1.1", body=b"hello"):
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        head = f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        yield connection


def test_the_sending_half_closed_the_answer_comes_and_then_the_end(served):
    app, address = served
    with asked(address) as connection:
        assert app.begun.wait(20)
        connection.shutdown(socket.SHUT_WR)
        assert not app.cut.wait(0.3)  # longer than the first two questions
        app.go.set()
        response = HTTPResponse(connection)
        response.begin()  # skips the interim answers, as clients do
        assert (response.status, response.read()) == (200, b'{"text":"hello"}')
        assert connection.recv(1) == b""


def test_two_requests_on_one_connection_are_both_answered(served):
    app, address = served
    app.go.set()
    with asked(address) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\ntwo")
        connection.shutdown(socket.SHUT_WR)
        seen = b""
        while piece := connection.recv(65536):
            seen += piece
    assert seen.count(b"HTTP/1.1 200") == 2
    assert b'"hello"' in seen
    assert b'"two"' in seen


@pytest.mark.parametrize("how", ["at once", "after the sending half"])
def test_who_leaves_ends_the_work(served, how):
    app, address = served
    with asked(address) as connection:
        assert app.begun.wait(20)
        if how == "after the sending half":
            connection.shutdown(socket.SHUT_WR)
            assert not app.cut.wait(0.2)
    assert app.cut.wait(20)


@pytest.mark.parametrize(("path", "version"), [("/events", "1.1"), ("/", "1.0")])
def test_where_nothing_can_be_asked_the_end_of_sending_is_the_end(served, path, version):
    app, address = served
    with asked(address, path, version) as connection:
        assert app.begun.wait(20)
        connection.shutdown(socket.SHUT_WR)
        assert app.cut.wait(20)


def test_half_a_request_is_no_request(served):
    app, address = served
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhel")
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass
    assert not app.begun.is_set()
