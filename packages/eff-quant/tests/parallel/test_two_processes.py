"""Two processes train adapters on a quantised base as one would, by DDP and by FSDP2, and save what one would."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from eff_quant import FP8Config, FP8Linear, keep_codes_local_
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

SCRIPT = Path(__file__).with_name("two_processes.py")


def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path)], env={**os.environ, **own, "RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(outputs)
    assert all(text.endswith("done\n") for text in outputs)


def test_a_layer_by_itself_names_its_own_buffers():
    layer = FP8Linear.from_linear(nn.Linear(16, 16), FP8Config())
    names = keep_codes_local_(layer)
    assert names == [name for name, _ in layer.named_buffers()]
    assert len(names) == 2
    assert keep_codes_local_(nn.Sequential(layer)) == [f"0.{name}" for name in names]
