"""Skips what needs a package that is not installed, without importing it."""

import importlib.util

import pytest


@pytest.fixture
def needs():
    """Function that skips the test unless all the modules are installed."""

    def check(*modules):
        missing = [m for m in modules if importlib.util.find_spec(m) is None]
        if missing:
            pytest.skip(f"not installed: {', '.join(missing)}")

    return check


@pytest.fixture
def without(monkeypatch):
    """Function that makes modules look as if they were not installed."""
    found = importlib.util.find_spec

    def hide(*modules):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in modules else found(name))

    return hide
