"""What the cross-package tests share: the members of the workspace, its tracked files and its pages."""

import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Member:
    name: str
    folder: Path
    project: dict

    @property
    def module(self) -> str:
        return self.name.replace("-", "_")

    @property
    def source(self) -> Path:
        return self.folder / "src" / self.module


def members() -> list[Member]:
    found = sorted([*ROOT.glob("packages/*/pyproject.toml"), *ROOT.glob("apps/*/pyproject.toml")])
    return [Member(p.parent.name, p.parent, tomllib.loads(p.read_text())["project"]) for p in found]


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).exists()]


def pages() -> list[Path]:
    return [path for path in tracked_files() if path.suffix == ".md" and not path.is_symlink()]


def pytest_generate_tests(metafunc):
    """Run a test that takes ``member`` once for each member, one that takes ``page`` once for each Markdown page."""
    if "member" in metafunc.fixturenames:
        metafunc.parametrize("member", members(), ids=lambda m: m.name)
    if "page" in metafunc.fixturenames:
        metafunc.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))


@pytest.fixture
def one_thread():
    """Torch computes in one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def all_members() -> list[Member]:
    return members()


@pytest.fixture(scope="session")
def files() -> list[Path]:
    return tracked_files()


@pytest.fixture(scope="session")
def run_python():
    """Run code in a fresh process, without what the test run has set; returns its output, fails with its error."""

    def run(code: str, *, timeout: float = 300, cwd: Path = ROOT) -> str:
        env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, cwd=cwd, env=env, check=False
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
