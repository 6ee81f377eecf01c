import sys

import pytest
import torch
from eff_quant.checkpoint import LEAST, CheckpointMemory
from eff_quant.hub import headers, quantized_entries
from safetensors import safe_open
from safetensors.torch import load_file, save_file

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")


@pytest.fixture
def file(tmp_path):
    """A safetensors file of two matrices of 2 MiB."""
    save_file({"x": torch.randn(512, 1024), "y": torch.randn(512, 1024)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def mapped(file, name):
    with safe_open(file, framework="pt", backend="mmap") as opened:
        return opened.get_slice(name)[...]


@linux
def test_pages_of_a_mapped_file_are_released_and_come_back(file):
    x = load_file(file)["x"].clone()
    memory = CheckpointMemory([file])
    view = mapped(file, "x")
    assert torch.equal(view, x)
    assert memory.release() >= 2**21
    assert memory.release() < 2**21
    assert torch.equal(view, x)
    assert memory.release() >= 2**21


@linux
def test_pages_are_released_when_enough_was_read(file):
    memory = CheckpointMemory([file])
    view = mapped(file, "x")
    view.sum()
    memory.took(LEAST - 1)
    assert memory.release() >= 2**21
    view.sum()
    memory.took(1)
    assert memory.release() < 2**21


def test_large_checkpoints_are_looked_at_a_fixed_number_of_times(tmp_path, monkeypatch):
    released = []
    monkeypatch.setattr(CheckpointMemory, "release", lambda self: released.append(self))
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.truncate(2**31)  # sparse
    memory = CheckpointMemory([tmp_path / "large.safetensors"])
    for _ in range(2**31 // 2**22):
        memory.took(2**22)
    assert len(released) == 64


@linux
def test_other_mappings_and_written_pages_are_left_alone(file, tmp_path):
    older = mapped(file, "x")
    older.sum()
    memory = CheckpointMemory([file])
    assert memory.release() == 0
    written = mapped(file, "y")
    written[3, 5] = 42.0  # a private copy of this page, which the file does not hold
    assert memory.release() == 0
    assert written[3, 5] == 42.0
    other = CheckpointMemory([tmp_path / "other.safetensors"])
    mapped(file, "x").sum()
    assert other.release() == 0
    assert CheckpointMemory([]).release() == 0


def test_entries_are_found_by_what_they_are(tmp_path):
    """Scales may be in another shard than the weight, and may be missing."""
    code = torch.zeros(2, 2, dtype=torch.int8)
    save_file({"a.weight": code, "b.weight": torch.zeros(2), "c.weight": code.clone()}, tmp_path / "1.safetensors")
    save_file({"a.SCB": torch.zeros(2)}, tmp_path / "2.safetensors")
    found = quantized_entries(headers(tmp_path.glob("*.safetensors")))
    assert {name: sorted(e) for name, e in found.items()} == {"a": ["SCB", "weight"], "c": ["weight"]}
    assert found["a"]["weight"].is_meta
    assert found["a"]["weight"].dtype == torch.int8
