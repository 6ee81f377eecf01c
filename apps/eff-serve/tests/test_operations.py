"""Files for operators: what they name exists."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from eff_serve.api.metrics import Families, Metrics
from eff_serve.cli import Model, Serve

FILES = Path(__file__).parents[1] / "operations"
OPTIONS = {f"--{f.name.replace('_', '-')}" for kind in (Serve, Model) for f in dataclasses.fields(kind)}
EXTENDS = ("", "_bucket", "_count", "_sum")


def metric_names():
    """Names of all samples that a server can give."""
    families = Families()
    Metrics(families, "m", lambda: None)
    names = {f.name for f in families.registry.collect()}
    counters = {f"{f.name}_total" for f in families.registry.collect() if f.type == "counter"}
    return {n + end for n in names for end in EXTENDS} | counters


def expressions():
    board = json.loads((FILES / "grafana.json").read_text(encoding="utf-8"))
    found = [t["expr"] for panel in board["panels"] for t in panel["targets"]]
    return found + [v["query"] for v in board["templating"]["list"] if v["type"] == "query"]


def test_every_metric_of_the_dashboard_exists():
    used = {name for text in expressions() for name in re.findall(r"\beff_\w+", text)}
    assert len(used) > 15
    assert used <= metric_names(), used - metric_names()


def test_the_dashboard_shows_every_family():
    shown = " ".join(expressions())
    for family in Families().registry.collect():
        if family.name not in ("eff_max_model_len", "eff_num_requests_layer_reuse"):
            assert family.name in shown, family.name


@pytest.mark.parametrize("name", ["eff-serve.service", "Containerfile"])
def test_options_in_files_exist(name):
    lines = (FILES / name).read_text(encoding="utf-8").splitlines()
    ours = " ".join(line for line in lines if line.startswith(("ExecStart", "ENTRYPOINT", "CMD")))
    given = set(re.findall(r"--[a-z-]+", ours))
    assert given
    assert given <= OPTIONS, given - OPTIONS


def test_pages_name_metrics_that_exist():
    docs = Path(__file__).parents[3] / "docs"
    for page in ("serve.md", "serve-operations.md", "serve-clients.md"):
        named = set(re.findall(r"`(eff_[a-z]\w+)`", (docs / page).read_text(encoding="utf-8")))
        assert {n for n in named if not n.startswith("eff_serve")} <= metric_names(), page
