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
 "dirty": false, "date": "2026-01-02T00:00:00", "checked": true, "ok": true, "threads": 1, "cpu_flags": "avx2"}
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
        record(provider="eff", p50=1.0, dirty=None),
        record(provider="eff", p50=1.0, ok=False),
        record(provider="eff", p50=1.0, checked=False),
        record(provider="eff", p50=1.0, commit=None),
        record(spec="big"),
        record(spec="big", provider="peer", commit="def", date="2026-01-05T00:00:00", torch="3"),
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


def test_the_line_below_names_all_that_is_mixed(tool, results):
    last = tool.table("r.jsonl device=A", results).splitlines()[-1]
    assert last.endswith("A, torch 2 and 3, 2026-01-02 to 2026-01-05, eff at abc and def.")
    one = tool.table("r.jsonl spec=8x4 device=A", results).splitlines()[-1]
    assert one.endswith("A, torch 2, 2026-01-02, eff at abc.")


def test_what_speeds_are_relative_to_may_be_unchecked_and_the_page_says_so(tool, results):
    bare = {"provider": "a library", "checked": False, "ok": False, "spec": "8x4", "device": "A"}
    lines = [record(**bare | {"p50": 8.0}), record(**bare | {"p50": 1.0, "commit": None}), record(spec="8x4")]
    (results / "r.jsonl").write_text("".join(lines))
    assert "a library" not in tool.table("r.jsonl", results)
    lines.append(record(**bare | {"spec": "alone"}))
    (results / "r.jsonl").write_text("".join(lines))
    table = tool.table("r.jsonl unchecked=a%20library", results)
    assert "alone" not in table
    assert "4.0 (2.00x)" in table
    assert "Results of a library were not compared with another. A, torch" in table
    with pytest.raises(tool.TableError, match="only what speeds are relative to may be unchecked"):
        tool.table("r.jsonl unchecked=a%20library baseline=eager", results)


ROWS = """<!-- rows: q.jsonl keys=2 by=method,keys
     | method = {method} | loss = {loss:.2f} | right = {right:.0%} -->
old
<!-- end rows -->
"""
ROW = {"method": "a", "keys": 2, "loss": 0.5, "right": 0.25, "device": "A", "commit": "abc", "dirty": False}
ROW |= {"date": "2026-01-02T00:00:00", "checked": True, "ok": True}


def write_rows(folder, *changes):
    (folder / "q.jsonl").write_text("".join(json.dumps(ROW | c) + "\n" for c in changes))


def test_table_of_rows(tool, tmp_path):
    faults = ({"checked": False}, {"ok": False}, {"commit": None}, {"dirty": True}, {"dirty": None})
    write_rows(tmp_path, {}, {"method": "b", "loss": 1}, {"keys": 9}, {"loss": 0.75, "commit": "def"}, *(
        {"loss": 9.0} | fault for fault in faults
    ))  # fmt: skip
    lines = tool.render(ROWS, tmp_path).splitlines()
    assert [[c.strip() for c in line.strip("|").split("|")] for line in lines[3:7]] == [
        ["method", "loss", "right"],
        ["--------", "------", "-------"],
        ["a", "0.75", "25%"],
        ["b", "1.00", "25%"],
    ]
    assert lines[8] == "A, 2026-01-02, eff at abc and def."
    assert tool.render("\n".join(lines), tmp_path) == "\n".join(lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"checked": False}, "no record that is checked"), ({"device": "B"}, "several machines"), ({"loss": "x"}, "fit")],
)
def test_rows_that_cannot_be_a_table(tool, tmp_path, change, message):
    write_rows(tmp_path, *([{}] if "device" in change else []), {"method": "b"} | change)
    with pytest.raises(tool.TableError, match=message):
        tool.render(ROWS, tmp_path)


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
        ("r.jsonl spec=huge", "no record that is checked, right, of a clean commit"),
        ("r.jsonl device=A baseline=other", "no provider 'other'"),
        ("r.jsonl", "several machines"),
    ],
)
def test_a_wish_that_cannot_be_met_is_an_error(tool, results, wish, message):
    with pytest.raises(tool.TableError, match=message):
        tool.table(wish, results)
