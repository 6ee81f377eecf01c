import sys
from pathlib import Path

import pytest
import torch
from eff_quant.llm_int8.checkpoint import check_int8_files, release_memory
from safetensors import safe_open
from safetensors.torch import save_file

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")


def mapped_pages(start):
    """Resident kilobytes of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and ":" not in head:
            low, high = (int(x, 16) for x in head.split("-"))
            inside = low <= start < high
        elif inside and head == "Rss:":
            return int(line.split()[1])
    return 0


@linux
def test_pages_of_a_mapped_file_are_released_and_come_back(tmp_path):
    x = torch.randn(512, 1024)
    save_file({"x": x, "y": x + 1}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt", backend="mmap") as file:
        view = file.get_slice("x")[...]
        assert torch.equal(view, x)
        before = mapped_pages(view.data_ptr())
        assert before >= 2048
        assert release_memory(view)
        assert mapped_pages(view.data_ptr()) <= before - 2000
        assert torch.equal(view, x)


@linux
def test_other_memory_is_left_alone(tmp_path):
    x = torch.randn(512, 1024)
    copy = x.clone()
    assert not release_memory(x)
    assert torch.equal(x, copy)
    torch.save(x, tmp_path / "model.pt")
    mapped = torch.load(tmp_path / "model.pt", mmap=True)
    assert not release_memory(mapped)
    assert not release_memory(torch.empty(0))
    assert not release_memory(torch.empty(4, device="meta"))


def test_files_are_checked_together(tmp_path):
    """Scales may be in another shard than the weight."""
    save_file({"a.weight": torch.zeros(2, 2, dtype=torch.int8), "b.weight": torch.zeros(2)}, tmp_path / "1.safetensors")
    save_file({"a.SCB": torch.zeros(2)}, tmp_path / "2.safetensors")
    assert check_int8_files(tmp_path.glob("*.safetensors")) == {"a"}
    with pytest.raises(KeyError, match="a: int8 weight without its scales"):
        check_int8_files([tmp_path / "1.safetensors"])
