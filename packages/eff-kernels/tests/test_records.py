import json
import subprocess
import time

import pytest
import torch
from eff_kernels.testing import Provider, Record, Recorder, load_records, measure, ratio_table, rotating, same
from eff_kernels.testing.machine import cpu_flags, device_name, last_level_cache_bytes, matmul_rate, read_bandwidth


def sleeper(name, seconds, calls=None):
    def run(i):
        if calls is not None:
            calls.append((name, i))
        time.sleep(seconds)

    return Provider(name, run)


def test_measure_takes_turns_and_counts_calls():
    calls = []
    times = measure([sleeper("a", 0, calls), sleeper("b", 0, calls)], rounds=6, sample_seconds=1e-5)
    for name in "ab":
        assert [i for n, i in calls if n == name] == list(range(sum(n == name for n, _ in calls)))
        assert times[name].n == 6
    order = [n for k, (n, _) in enumerate(calls) if k == 0 or calls[k - 1][0] != n]
    assert len(order) > 8  # neither ran all its samples in one go


def test_measure_finds_the_slower_one():
    times = measure([sleeper("quick", 1e-4), sleeper("slow", 3e-3)], rounds=5)
    assert times["slow"].p20 > 2e-3  # a sleep is never shorter than asked
    assert times["slow"].p20 <= times["slow"].p50 <= times["slow"].p80


def test_provider_names_must_differ():
    with pytest.raises(ValueError, match="must differ"):
        measure([sleeper("a", 0), sleeper("a", 0)])


def test_recorder_writes_what_load_records_reads(tmp_path):
    path = tmp_path / "deep" / "op.jsonl"
    recorder = Recorder("op", path)
    a = torch.randn(64, 64)
    providers = [
        Provider("unchecked", lambda i: a + a),
        Provider("eager", lambda i: a + a, check=lambda: True),
        Provider("wrong", lambda i: a, backend="cpu", check=lambda: same(a, a + a, tolerance=1e-6)),
    ]
    recorder.run("64x64 fp32", providers, mode="forward, cache", bytes=2 * 4 * 64 * 64, flops=64 * 64, rounds=4)
    records = load_records(path)
    assert records == recorder.records
    unchecked, right, wrong = records
    assert [(r.checked, r.ok) for r in records] == [(False, False), (True, True), (True, False)]
    assert not unchecked.publishable
    eager = right
    assert (wrong.backend, wrong.provider, wrong.mode, wrong.n) == ("cpu", "wrong", "forward, cache", 4)
    assert eager.p20 <= eager.p50 <= eager.p80
    assert eager.achieved == pytest.approx(2 * 4 * 64 * 64 / eager.p50 / 1e3, rel=1e-2, abs=1e-3)
    assert eager.roofline > 0
    assert (eager.threads, eager.torch, eager.unit) == (1, torch.__version__, "us")
    assert eager.device == device_name()
    assert set(json.loads(path.read_text().splitlines()[0])) == set(Record.__dataclass_fields__)
    recorder.run("again", providers, mode="forward, cache", rounds=4)
    assert len(load_records(path)) == 6  # appended
    assert load_records(path)[3].roofline is None
    assert load_records(path)[3].achieved is None


def test_state_of_the_code(tmp_path):
    def git(*args):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *args], check=True)

    source = tmp_path / "code.py"
    source.write_text("1")
    git("init", "-q")
    git("add", "code.py")
    git("commit", "-q", "-m", "one")
    (tmp_path / "other.py").write_text("not measured")
    clean = Recorder("op", None, sources=[source])
    clean.run("s", [sleeper("a", 0)], mode="m", rounds=2)
    assert clean.records[0].dirty is False
    assert len(clean.records[0].commit) == 12
    both = Recorder("op", None, sources=[source, tmp_path / "other.py"])
    both.run("s", [sleeper("a", 0)], mode="m", rounds=2)
    assert both.records[0].dirty is True


def test_code_outside_a_repository_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))  # the temporary folder may lie in one
    (tmp_path / "code.py").write_text("1")
    recorder = Recorder("op", None, sources=[tmp_path / "code.py"])
    recorder.run("s", [sleeper("a", 0)], mode="m", rounds=2)
    assert (recorder.records[0].commit, recorder.records[0].dirty) == (None, None)


def made(provider, p50, **changes):
    fields = dict.fromkeys(Record.__dataclass_fields__)
    fields |= {"spec": "s", "mode": "m", "threads": 1, "provider": provider, "p50": p50, "roofline": 0.5}
    fields |= {"checked": True, "ok": True, "commit": "abc", "dirty": False}
    return Record(**(fields | changes))


def test_a_record_may_be_published_if_checked_right_and_of_a_clean_commit():
    assert made("eff", 1.0).publishable
    for fault in ({"checked": False}, {"ok": False}, {"commit": None}, {"dirty": True}, {"dirty": None}):
        assert not made("eff", 1.0, **fault).publishable, fault


def test_a_line_that_does_not_say_that_it_was_checked_was_not(tmp_path):
    line = {k: v for k, v in vars_of(made("eff", 1.0)).items() if k != "checked"}
    (tmp_path / "old.jsonl").write_text(json.dumps(line) + "\n")
    (record,) = load_records(tmp_path / "old.jsonl")
    assert not record.checked
    assert not record.publishable


def vars_of(record):
    return {name: getattr(record, name) for name in Record.__dataclass_fields__}


def test_slow_calls_are_warmed_up_once():
    calls = []
    measure([sleeper("slow", 3e-2, calls)], rounds=2, sample_seconds=1e-4)
    assert len(calls) == 2 + 2 * 2


def test_table_of_ratios():
    records = [made("eager", 8.0), made("eff", 2.0), made("eager", 6.0, spec="t"), made("eff", 3.0, spec="t", ok=False)]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in ratio_table(records).splitlines()]
    assert lines[0] == ["spec", "mode", "threads", "eager", "eff", "roofline"]
    assert lines[2] == ["s", "m", "1", "8.0", "2.0 (4.00x)", "0.50"]
    assert lines[3] == ["t", "m", "1", "6.0", "3.0 WRONG", "0.50"]
    assert "3.0 unchecked" in ratio_table([made("eager", 6.0), made("eff", 3.0, checked=False, ok=False)])
    assert "x)" not in ratio_table([made("eager", 6.0, ok=False), made("eff", 3.0)])
    assert len({len(line) for line in ratio_table(records).splitlines()}) == 1
    assert "8.0 (0.25x)" in ratio_table(records, "eff")
    assert ratio_table(records, "eff").split("|")[4:6] == [" eff       ", " eager       "]


def test_table_with_a_provider_missing_in_a_row():
    table = ratio_table([made("eager", 8.0), made("eff", 2.0), made("eff", 2.0, spec="t", roofline=None)])
    assert table.splitlines()[3].split("|")[4:7] == [" " * 7, " 2.0         ", "          "]


def test_a_column_of_rooflines_that_nobody_counted_is_left_out():
    records = [made("eager", 8.0, roofline=None), made("eff", 2.0, roofline=None)]
    assert ratio_table(records).splitlines()[0].split() == [
        "|",
        "spec",
        "|",
        "mode",
        "|",
        "threads",
        "|",
        "eager",
        "|",
        "eff",
        "|",
    ]


def test_rotating_sets_do_not_fit_the_cache():
    size = last_level_cache_bytes() // 3
    sets = rotating(lambda: object(), size)
    assert len(sets) * size > 4 * last_level_cache_bytes()
    assert len(set(map(id, sets))) == len(sets)
    assert len(rotating(lambda: object(), 100 * last_level_cache_bytes())) == 2


def test_same():
    a = torch.randn(10)
    assert same(a, a, tolerance=0)
    assert same((a, a), (a, a + 1e-7), tolerance=1e-5)
    assert not same((a, a), (a, a + 1e-2), tolerance=1e-5)
    assert not same(a, a[:5], tolerance=1)
    assert not same(a * float("nan"), a, tolerance=1)


def test_machine():
    assert cpu_flags()
    assert cpu_flags() in device_name()
    assert last_level_cache_bytes() >= 2**20
    assert 1e8 < read_bandwidth(2**20, 1) < 1e13
    assert 1e8 < matmul_rate(1) < 1e14
