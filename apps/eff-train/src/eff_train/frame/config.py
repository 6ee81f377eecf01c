"""Config dataclasses to and from plain dicts and YAML, and as options of a command; unknown keys are refused."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Turn a config into dicts, lists, numbers and text that YAML and JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a config cannot hold {type(value).__name__}; wanted numbers, text, paths, tuples or dataclasses")


def from_plain(cls: type[T], data: Any, where: str = "config") -> T:
    """Build the dataclass ``cls`` from what `to_plain` gave. Keys may be missing (their default holds).

    Raises:
        ValueError: an unknown key, or a value that the config refuses.
        TypeError: a value of the wrong kind; the message names the key.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"{where}: wanted keys and values, got {data!r}")
    fields = {f.name for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    if unknown := sorted(set(map(str, data)) - fields):
        raise ValueError(f"{where}: unknown keys {', '.join(unknown)}; known are {', '.join(sorted(fields))}")
    hints = get_type_hints(cls)
    return cls(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    """``value`` as the annotation ``kind`` asks for it."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _first_fit(args, value, where)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where}: got {value!r}, wanted one of {', '.join(map(repr, args))}")
        return value
    if origin in (tuple, list):
        return _sequence(origin, args, value, where)
    if origin is dict and isinstance(value, Mapping):
        return {k: _value(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return from_plain(kind, value, where)  # type: ignore[arg-type]
    return _scalar(kind, value, where)


def _first_fit(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    problems = []
    for kind in kinds:
        try:
            return _value(kind, value, where)
        except (TypeError, ValueError) as problem:
            problems.append(str(problem))
    raise TypeError("; or ".join(problems))


def _sequence(origin: type, args: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{where}: wanted a list, got {value!r}")
    if origin is tuple and args[-1] is not Ellipsis:
        if len(args) != len(value):
            raise ValueError(f"{where}: wanted {len(args)} values, got {len(value)}: {value!r}")
        kinds = args
    else:
        kinds = (args[0],) * len(value)
    return origin(_value(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind in (None, type(None)) and value is None:
        return None
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    if kind is float and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3 (without a point) as text.
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(kind, type) and type(value) is kind:
        return value
    raise TypeError(f"{where}: wanted {getattr(kind, '__name__', kind)}, got {value!r}")


def write_yaml(path: Path, data: Mapping[str, Any]) -> None:
    """Write ``data`` in the order of its keys."""
    path.write_text(dump_yaml(data))


def dump_yaml(data: Mapping[str, Any]) -> str:
    """``data`` as YAML text, keys in their order."""
    return yaml.safe_dump(dict(data), sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds keys and values.

    Raises:
        ValueError: the file is not YAML or holds something else.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {type(data).__name__}, wanted keys and values")
    return data


def options(config: Any, default: Any, prefix: str = "--") -> list[str]:
    """The command-line options that turn ``default`` into ``config``, as tyro reads them."""
    words: list[str] = []
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        name = prefix + field.name.replace("_", "-")
        if value == usual:
            continue
        if dataclasses.is_dataclass(value):
            words += options(value, usual, name + ".")
        elif isinstance(value, bool):
            words.append(name if value else prefix + "no-" + field.name.replace("_", "-"))
        elif isinstance(value, (tuple, list)):
            words += [name, *map(str, value)]
        else:
            words += [name, str(value)]
    return words
