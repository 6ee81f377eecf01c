"""The tables of results in the pages are those that the records give."""

import importlib.util
import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def tool(root):
    spec = importlib.util.spec_from_file_location("bench_tables", root / "tools" / "bench_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECORD = """
{"op": "rms_norm", "spec": "8x4 fp32", "provider": "eager", "backend": "", "mode": "forward, cache", "metric": "time",
 "unit": "us", "p20": 3.0, "p50": 4.0, "p80": 5.0, "n": 40, "bytes": null, "flops": null, "achieved": null,
 "roofline": null, "device": "A", "torch": "2", "triton": null, "driver": null, "eff": "0", "commit": "abc",
 "dirty": false, "date": "2026-01-02T00:00:00", "ok": true, "threads": 1, "cpu_flags": "avx2"}
"""


def record(**changes) -> str:
    return json.dumps(json.loads(RECORD) | changes) + "\n"


@pytest.fixture
def results(tmp_path):
    lines = [
        record(),
        record(provider="eff", p50=9.0, date="2026-01-01T00:00:00"),
        record(provider="eff", p50=2.0),
        record(provider="eff", p50=1.0, dirty=True),
        record(provider="eff", p50=1.0, ok=False),
        record(spec="big"),
        record(device="B"),
    ]
    (tmp_path / "r.jsonl").write_text("".join(lines))
    return tmp_path


def test_pages_are_up_to_date(root):
    tool = root / "tools" / "bench_tables.py"
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"run `uv run tools/bench_tables.py`\n{done.stdout}{done.stderr}"


def test_latest_clean_and_right_record_counts(tool, results):
    page = "# P\n<!-- bench: r.jsonl spec=8x4 device=A -->\nold\n<!-- end bench -->\nrest\n"
    new = tool.render(page, results)
    assert "old" not in new
    assert "2.0 (2.00x)" in new
    assert "1.0" not in new
    assert "9.0" not in new
    assert new.endswith("<!-- end bench -->\nrest\n")
    assert tool.render(new, results) == new


def test_providers_may_be_rows(tool, results):
    lines = tool.table("r.jsonl spec=8x4 device=A rows=provider", results).splitlines()
    names = [line.split("|")[1].strip() for line in lines[:6]]
    assert [names[0], *names[2:]] == ["spec", "mode", "threads", "eager", "eff"]
    assert "2.0 (2.00x)" in lines[5]
    assert "relative to the first row" in lines[-1]


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("r.jsonl rows=odd", "wanted rows=spec or rows=provider"),
        ("gone.jsonl", "does not exist"),
        ("r.jsonl colour=red", "no field colour"),
        ("r.jsonl spec=huge", "no record that is right, clean"),
        ("r.jsonl device=A baseline=other", "no provider 'other'"),
        ("r.jsonl", "several machines"),
    ],
)
def test_a_wish_that_cannot_be_met_is_an_error(tool, results, wish, message):
    with pytest.raises(tool.TableError, match=message):
        tool.table(wish, results)
