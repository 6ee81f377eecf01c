"""A cached folder is whole or made again, whatever happened to it and whoever asks for it at the same time."""

import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from eff_embedded.cache import MANIFEST, cache_dir, cached, defect, file_hash

BIG = 40 * 2**20 + 7  # three blocks of the checksum


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EFF_CACHE_DIR", str(tmp_path))


class Maker:
    def __init__(self):
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "weights").write_bytes(b"\1" * BIG)
        (folder / "part").mkdir()
        (folder / "part" / "config.json").write_text("{}")


def cut(folder):
    os.truncate(folder / "weights", BIG // 2)


def flip(folder):
    """One bit in the middle, with the size and the times as they were."""
    path = folder / "weights"
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(20 * 2**20)
        file.write(b"\3")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def lose(folder):
    (folder / "part" / "config.json").unlink()


def lose_manifest(folder):
    (folder / MANIFEST).unlink()


def cut_manifest(folder):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-10])


def other_manifest(folder):
    (folder / MANIFEST).write_text(json.dumps({"format": 99, "files": {}}))


def odd_manifest(folder):
    (folder / MANIFEST).write_text("[]")


DAMAGES = [cut, flip, lose, lose_manifest, cut_manifest, other_manifest, odd_manifest]


def test_made_once():
    make = Maker()
    folder = cached("model", make)
    assert folder == cache_dir() / "model"
    assert cached("model", make) == folder
    assert make.calls == 1
    assert sorted(p.name for p in cache_dir().iterdir()) == [".model.lock", "model"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed_and_mended(damage, caplog):
    make = Maker()
    folder = cached("model", make)
    damage(folder)
    assert defect(folder)
    cached("model", make)
    assert make.calls == 2
    assert defect(folder) is None
    assert "is damaged" in caplog.text
    assert sorted(p.name for p in cache_dir().iterdir()) == [".model.lock", "model"]


def test_a_failure_leaves_nothing():
    def fail(folder):
        (folder / "weights").write_bytes(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        cached("model", fail)
    assert [p.name for p in cache_dir().iterdir()] == [".model.lock"]
    assert cached("model", Maker()).is_dir()


def test_file_hash_depends_on_every_block(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\0" * BIG)
    seen = {file_hash(path)}
    for place in (0, 17 * 2**20, BIG - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"\1")
        seen.add(file_hash(path))
    path.write_bytes(b"")
    seen.add(file_hash(path))
    assert len(seen) == 5


def slow(folder: Path) -> None:
    time.sleep(0.5)
    (folder / "pid").write_text(str(os.getpid()))


def ask(queue) -> None:
    queue.put((os.getpid(), (cached("model", slow) / "pid").read_text()))


def test_processes_at_once_make_it_once():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=ask, args=(queue,)) for _ in range(3)]
    for process in processes:
        process.start()
    got = [queue.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(timeout=30)
    assert len({maker for _, maker in got}) == 1
    assert {maker for _, maker in got} <= {str(pid) for pid, _ in got}


def test_a_killed_process_leaves_no_model():
    code = textwrap.dedent(
        """
        import os, signal
        from eff_embedded.cache import cached
        def half(folder):
            (folder / "weights").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        cached("model", half)
        """
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
    assert not (cache_dir() / "model").exists()
    make = Maker()
    cached("model", make)
    assert make.calls == 1
    assert sorted(p.name for p in cache_dir().iterdir()) == [".model.lock", "model"]
