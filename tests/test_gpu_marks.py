"""Which tests a machine with a GPU runs: Triton kernels natively, and not those of the interpreter."""

import os
import subprocess
import sys

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
