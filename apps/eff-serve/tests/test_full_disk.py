"""Where nothing more can be written, the server starts all the same."""

import sys

import pytest
from eff_serve import server
from eff_serve.cli import Serve
from eff_serve.engine.load import _progress


@pytest.fixture
def full():
    try:
        stream = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - its end is the point
    except OSError:
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match="No space left"):
        stream.write("x\n")
    yield stream
    with pytest.raises(OSError, match="No space left"):
        stream.close()


def test_loading_writes_to_no_log(full, monkeypatch):
    monkeypatch.setattr(sys, "stderr", full)
    with _progress(True, 2) as step:
        step()


def test_the_banner_may_be_lost(full, monkeypatch):
    monkeypatch.setattr(sys, "stdout", full)
    server._banner("ready", Serve(), 8000)
