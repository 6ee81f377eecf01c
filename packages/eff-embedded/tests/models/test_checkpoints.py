"""Checkpoints of our own: small, whole, with a record, never overwritten."""

import json
import shutil

import pytest
import torch
from eff_embedded.checkpoints import MAX_BYTES, RECORD_KEYS, checkpoint, checkpoints, save_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file

RECORD = {key: f"some {key}" for key in RECORD_KEYS}


def write(folder, dtype=torch.bfloat16, count=100):
    save_file({"w": torch.arange(count).to(dtype), "steps": torch.tensor([3])}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"width": 3}')


def test_saved_and_found_again(tmp_path):
    saved = save_checkpoint("eyes-v1", write, {**RECORD, "note": "x"}, root=tmp_path)
    found = checkpoint("eyes-v1", root=tmp_path)
    assert found == saved
    assert found.record == {"name": "eyes-v1", **RECORD, "note": "x"}
    assert torch.equal(found.weights()["w"], torch.arange(100).bfloat16())
    assert checkpoints(root=tmp_path) == ("eyes-v1",)
    assert [p.name for p in tmp_path.iterdir()] == ["eyes-v1"]


def test_none_is_overwritten(tmp_path):
    save_checkpoint("eyes-v1", write, RECORD, root=tmp_path)
    with pytest.raises(FileExistsError, match="next version"):
        save_checkpoint("eyes-v1", write, RECORD, root=tmp_path)
    save_checkpoint("eyes-v2", write, RECORD, root=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "Eyes"}, "name='Eyes'"),
        ({"name": "../eyes-v1"}, "name="),
        ({"record": dict.fromkeys(RECORD_KEYS[1:], 1)}, "lacks"),
        ({"write": lambda f: write(f, torch.float32)}, "w is F32"),
        ({"write": lambda f: write(f, count=MAX_BYTES // 2)}, "bytes"),
        ({"write": lambda f: (f / "model.bin").write_bytes(b"1")}, "no safetensors"),
        ({"write": lambda f: (f / "checksums.json").write_text("{}")}, "checksums.json"),
    ],
)
def test_refuses(tmp_path, options, message):
    arguments = {"name": "eyes-v1", "write": write, "record": RECORD, **options}
    with pytest.raises(ValueError, match=message):
        save_checkpoint(**arguments, root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_noticed(tmp_path):
    folder = save_checkpoint("eyes-v1", write, RECORD, root=tmp_path).folder
    (folder / "record.json").write_text(json.dumps({**RECORD, "scores": "better"}))
    with pytest.raises(ValueError, match=r"eyes-v1 is damaged: record\.json"):
        checkpoint("eyes-v1", root=tmp_path)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="known: none"):
        checkpoint("eyes-v1", root=tmp_path)


def test_those_in_the_package_are_whole_and_small():
    """Also where a checkpoint was put there by other means than ``save_checkpoint``."""
    for name in checkpoints():
        found = checkpoint(name)
        assert found.record["name"] == name
        assert set(RECORD_KEYS) <= found.record.keys()
        assert sum(p.stat().st_size for p in found.folder.rglob("*")) < 1.1 * MAX_BYTES
        for path in found.folder.rglob("*.safetensors"):
            with safe_open(path, "pt") as file:
                kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
            assert "F32" not in kinds
