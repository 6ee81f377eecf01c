"""Configs to YAML and back, and to options of a command."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from eff_train.commands.run import parse
from eff_train.errors import Refused
from eff_train.frame import TrainConfig
from eff_train.frame.config import dump_yaml, from_plain, options, read_yaml, to_plain


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Part.

    Attributes:
        rate: A rate.
        fast: A switch.
    """

    rate: float = 0.5
    fast: bool = True


@dataclass(frozen=True, kw_only=True)
class Options(TrainConfig):
    """Options.

    Attributes:
        inner: Part.
        sizes: Sizes.
        path: A path.
        mode: A mode.
    """

    inner: Inner = field(default_factory=Inner)
    sizes: tuple[int, ...] = (1, 2)
    path: Path | None = None
    mode: Literal["a", "b"] = "a"


CHANGED = Options(
    inner=Inner(rate=1e-5, fast=False),
    sizes=(3,),
    path=Path("x y"),
    mode="b",
    lr=1e-4,
    betas=(0.5, 0.75),
    tensorboard=True,
)


def test_yaml_round_trip(tmp_path):
    (tmp_path / "c.yaml").write_text(dump_yaml(to_plain(CHANGED)))
    assert from_plain(Options, read_yaml(tmp_path / "c.yaml")) == CHANGED


def test_options_repeat_a_config():
    words = options(CHANGED, Options())
    assert parse(Options, "x", words)[1] == CHANGED
    assert options(Options(), Options()) == []
    assert options(Options(), CHANGED) != []


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        ({"stepz": 1}, ValueError, "config: unknown keys stepz; known are .*steps"),
        ({"inner": {"rates": 1}}, ValueError, "config.inner: unknown keys rates"),
        ({"steps": "many"}, TypeError, "config.steps: wanted int, got 'many'"),
        ({"steps": True}, TypeError, "config.steps"),
        ({"steps": 1.5}, TypeError, "config.steps"),
        ({"lr": False}, TypeError, "config.lr"),
        ({"sizes": 3}, TypeError, "config.sizes: wanted a list"),
        ({"sizes": [1, "x"]}, TypeError, r"config.sizes\[1\]"),
        ({"betas": [0.5]}, ValueError, "wanted 2 values, got 1"),
        ({"mode": "c"}, ValueError, "config.mode: got 'c', wanted one of 'a', 'b'"),
        ({"inner": 3}, TypeError, "config.inner: wanted keys and values"),
        ({"path": 3}, TypeError, "config.path"),
        ([1], TypeError, "config"),
    ],
)
def test_wrong_data_is_refused(data, error, match):
    with pytest.raises(error, match=match):
        from_plain(Options, data)


def test_numbers_without_a_point_are_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 1e-3\nclip: 2\n")
    assert from_plain(Options, read_yaml(tmp_path / "c.yaml")) == Options(lr=1e-3, clip=2.0)


def test_only_plain_values_are_written():
    with pytest.raises(TypeError, match="cannot hold object"):
        to_plain({"a": object()})


@pytest.mark.parametrize("text", ["a: [", "- 1"])
def test_files_that_are_no_config(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"c\.yaml"):
        read_yaml(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"ema": 1.0}, "ema must be from 0 to below 1, got 1.0"),
        ({"betas": (0.9, -1.0)}, "betas"),
        ({"clip": -1.0}, "clip must not be negative"),
        ({"lr_end": 2.0}, "lr_end"),
        ({"warmup": 2000}, "warmup=2000 is longer than steps=1000"),
        ({"accumulate": 3}, "accumulate=3 does not divide batch_size=32"),
    ],
)
def test_options_are_checked(changed, match):
    with pytest.raises(ValueError, match=match):
        TrainConfig(**changed)


def test_command_line_goes_before_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("version: 1\nrecipe: x\nconfig: {steps: 5, lr: 0.5}\n")
    place, config = parse(Options, "x", ["--config", str(path), "--steps", "7"])
    assert config == Options(steps=7, lr=0.5)
    assert place.config == path
    assert parse(Options, "x", [f"--config={path}"])[1] == Options(steps=5, lr=0.5)
    with pytest.raises(ValueError, match="of the recipe 'x', not of 'y'"):
        parse(Options, "y", ["--config", str(path)])
    path.write_text("version: 2\nrecipe: x\nconfig: {}\n")
    with pytest.raises(ValueError, match="format 2"):
        parse(Options, "x", ["--config", str(path)])
    path.write_text("version: 1\nrecipe: x\nconfigs: {}\n")
    with pytest.raises(ValueError, match="wanted version, recipe, config"):
        parse(Options, "x", ["--config", str(path)])


def test_refused_is_no_value_error():
    """A recipe's own ValueError must stay a traceback."""
    assert not issubclass(Refused, ValueError)
