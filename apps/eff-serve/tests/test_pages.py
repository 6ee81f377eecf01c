"""The pages about the server name things that exist."""

import importlib
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[3] / "docs"
NAME = re.compile(r"`(eff_(?:serve|http)(?:\.\w+)+)`")


def resolve(name):
    """The module or what lies in it, by its dotted name."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def test_the_life_of_a_request_names_what_exists():
    names = NAME.findall((DOCS / "serve-request.md").read_text(encoding="utf-8"))
    assert len(set(names)) > 30
    for name in names:
        resolve(name)


def test_a_name_that_is_gone_would_be_found():
    with pytest.raises(AttributeError):
        resolve("eff_serve.engine.scheduler.Scheduler.gone")
