"""Each example runs as it stands, in an empty folder, and prints something."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_runs(example, tmp_path):
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, str(example)],
        cwd=tmp_path,
        env={**os.environ, "PATH": programs},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_each_package_and_app_has_one(all_members):
    """eff-http is a part of the two servers and of no use alone."""
    named = {path.stem.split("_")[0] for path in EXAMPLES}
    assert {m.name.removeprefix("eff-") for m in all_members} - {"http"} == named


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_says_how_to_run_it(example):
    assert f"examples/{example.name}" in example.read_text().split('"""')[1]
