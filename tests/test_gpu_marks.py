"""Which tests a machine with a GPU runs: Triton kernels natively, and not those of the interpreter."""

import importlib.util
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

FILE = "packages/eff-kernels/tests/ops/test_rms_norm.py"


@pytest.mark.parametrize("interpret", [False, True])
def test_native_kernels_are_for_the_gpu(interpret, pytestconfig):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | (
        {"TRITON_INTERPRET": "1"} if interpret else {}
    )
    command = [sys.executable, "-m", "pytest", FILE, "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=pytestconfig.rootpath, env=env, capture_output=True, text=True, check=False)
    chosen = [line for line in run.stdout.splitlines() if "::" in line]
    if interpret:
        assert run.returncode == 5, run.stdout
        assert not chosen
    else:
        assert run.returncode == 0, run.stdout
        assert chosen
        assert all("triton" in line for line in chosen)


@pytest.fixture
def noxfile(root, monkeypatch):
    """The noxfile, whose sessions are plain functions; nox itself is not in the test environment."""

    def plain(function=None, **_):
        return plain if function is None else function

    nox = ModuleType("nox")
    nox.session, nox.parametrize, nox.param = plain, lambda *_, **__: plain, lambda value, **_: value
    nox.options, nox.Session = SimpleNamespace(), object
    spec = importlib.util.spec_from_file_location("noxfile_of_eff", root / "noxfile.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "nox", nox)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


class Session:
    """Notes what it is asked to run."""

    posargs = ()
    virtualenv = SimpleNamespace(location="")

    def run(self, *command, **options):
        self.command, self.options = command, options

    def run_install(self, *command, **options):
        pass


def test_a_member_with_kernels_that_selects_no_test_fails(noxfile, root):
    """pytest ends with 5 where it selects nothing: fine only where there is no kernel."""
    with_kernels = set()
    for name, target in noxfile.TARGETS.items():
        session = Session()
        noxfile.tests_gpu(session, target)
        assert session.command[-1] == "gpu"
        sources = (root / target.folder / "src").rglob("*.py")
        if any("@triton.jit" in path.read_text() for path in sources):
            with_kernels.add(name)
        assert session.options["success_codes"] == ([0] if name in with_kernels else [0, 5])
    assert with_kernels == {"kernels", "quant"}


def test_quant_has_tests_for_the_gpu(pytestconfig):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    file = "packages/eff-quant/tests/experts/test_launch.py"
    command = [sys.executable, "-m", "pytest", file, "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=pytestconfig.rootpath, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
