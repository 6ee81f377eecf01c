import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from eff_kernels.edit import Record, Settings, write_whole
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(Settings):
    size: int = 1


@dataclass(frozen=True, slots=True)
class Layer:
    scale: Tensor
    order: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Profile(Record):
    overlap: NDArray[np.float32]
    layers: Mapping[str, Layer] = field(default_factory=dict)
    config: Config = Config()
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Words(Record):
    kind: tuple[str, ...] = ()
    score: float = 0.0


def profile():
    base = torch.arange(12.0).view(3, 4)
    layers = {"a.q": Layer(base.T, torch.tensor([2, 0, 1])), "a.k": Layer(base[1:].bfloat16())}
    return Profile(np.eye(3, dtype=np.float32), layers, Config(size=4), {"text": "caf\u00e9", "steps": [1, 2.5, None]})


def test_tensors_arrays_and_settings_come_back(tmp_path):
    saved = profile()
    saved.save(tmp_path / "profile")
    assert os.listdir(tmp_path) == ["profile"]  # exactly this name, and nothing beside it
    (tmp_path / "other").touch()
    assert (tmp_path / "profile").stat().st_mode == (tmp_path / "other").stat().st_mode
    again = Profile.load(tmp_path / "profile")
    assert isinstance(again.overlap, np.ndarray)
    assert again.overlap.dtype == np.float32
    np.testing.assert_array_equal(again.overlap, saved.overlap)
    for name, layer in saved.layers.items():
        assert torch.equal(again.layers[name].scale, layer.scale)
        assert again.layers[name].scale.dtype == layer.scale.dtype
    assert torch.equal(again.layers["a.q"].order, saved.layers["a.q"].order)
    assert again.layers["a.k"].order is None
    assert (again.config, again.meta) == (saved.config, saved.meta)


def test_words_and_numbers_are_readable_json(tmp_path):
    saved = Words(("full", "reuse"), 0.5)
    saved.save(tmp_path / "policy.json")
    text = (tmp_path / "policy.json").read_text()
    assert json.loads(text) == {"record": "Words", "version": 1, "kind": ["full", "reuse"], "score": 0.5}
    assert Words.load(tmp_path / "policy.json") == saved
    assert Words.from_dict(json.loads(text)) == saved


def test_parts_that_share_memory_are_saved_each(tmp_path):
    base = torch.arange(4.0)
    Profile(np.zeros(1, np.float32), {"a": Layer(base), "b": Layer(base[:2])}).save(tmp_path / "p")
    assert Profile.load(tmp_path / "p").layers["b"].scale.tolist() == [0, 1]


@pytest.mark.parametrize("length", [0, 3, 30, 200, -1])
def test_a_file_that_was_cut_is_refused(tmp_path, length):
    path = tmp_path / "p"
    profile().save(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="p is not a Profile file"):
        Profile.load(path)


def test_a_cut_or_foreign_json_is_refused(tmp_path):
    path = tmp_path / "p.json"
    Words(("full",)).save(path)
    path.write_text(path.read_text()[:30])
    with pytest.raises(ValueError, match=r"p.json is not a complete Words file: Expecting value"):
        Words.load(path)
    path.write_text('{"model": 3, "and more": 4}')
    with pytest.raises(ValueError, match=r"p.json is not a complete Words file: Words has no \['and more', 'model'\]"):
        Words.load(path)


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="is not a Profile file: it is a safetensors file of something else"):
        Profile.load(tmp_path / "weights")
    profile().save(tmp_path / "p")
    with pytest.raises(ValueError, match="record='Profile'; Words reads 'Words'"):
        Words.load(tmp_path / "p")
    np.savez(tmp_path / "old.npz", overlap=np.zeros(3))
    with pytest.raises(ValueError, match="of another format"):
        Profile.load(tmp_path / "old.npz")
    with pytest.raises(FileNotFoundError):
        Profile.load(tmp_path / "none")


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "p.json"
    Words(("full",)).save(path)

    def broken(file):
        with open(file, "w") as half:
            half.write("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_whole(path, broken)
    assert Words.load(path) == Words(("full",))
    assert os.listdir(tmp_path) == ["p.json"]


def test_what_no_file_holds_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"meta.model is a Linear"):
        Profile(np.zeros(1, np.float32), meta={"model": torch.nn.Linear(1, 1)}).save(tmp_path / "p")
    assert os.listdir(tmp_path) == []
