"""Frozen settings that check themselves and travel as JSON: what the configs of all methods share.

A config is a frozen dataclass on `Settings`. Its annotations are the rules: values are checked against them when it is
made, and read back by them from JSON, so that a config needs code for nothing but its own limits.
"""

from __future__ import annotations

import dataclasses
import types
import typing
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Base of frozen dataclasses of settings.

    When one is made, every value is brought to the form of its annotation (a list to a tuple, the name of a dtype to
    the dtype, a mapping to nested settings), or refused with its name: what is of another kind with TypeError, what is
    none of the choices of a ``Literal`` with ValueError. Then `check` runs.

    Attributes:
        version: Of the JSON form; to be raised when that changes, with `upgrade` for the earlier ones.
        tags: Entries that `to_dict` writes first and `from_dict` compares, such as the name of a method.
    """

    version: ClassVar[int] = 1
    tags: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            object.__setattr__(self, name, conform(getattr(self, name), hint, name))
        self.check()

    def check(self) -> None:
        """Refuse values that do not fit each other or lie outside of their range; for subclasses."""

    @classmethod
    def upgrade(cls, values: dict[str, Any], version: int) -> dict[str, Any]:
        """Turn entries of an earlier version into those of this one; for subclasses whose ``version`` is above 1."""
        return values

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them, with the version."""
        return {**self._all_tags(), "version": self.version, **fields_of(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild the settings from `to_dict`; what is left out takes its default.

        Raises:
            ValueError: other settings than these, a version that this code does not know, unknown or missing entries.
            TypeError: a value is of another kind than its annotation says.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"{cls.__name__} is read from a mapping, got {type(values).__name__}")
        left = dict(values)
        for key, wanted in cls._all_tags().items():
            if (seen := left.pop(key, wanted)) != wanted:
                raise ValueError(f"{key}={seen!r}; {cls.__name__} reads {wanted!r}")
        version = left.pop("version", cls.version)
        if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= cls.version:
            known = "version 1" if cls.version == 1 else f"versions 1 to {cls.version}"
            raise ValueError(
                f"{cls.__name__} of version {version!r}; this release reads {known}; a newer release may read it"
            )
        if version < cls.version:
            left = cls.upgrade(left, version)
        return make(cls, left)

    @classmethod
    def _all_tags(cls) -> dict[str, str]:
        return dict(cls.tags)


def make(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """A dataclass from its entries, each brought to the form of its annotation.

    Raises:
        ValueError: entries are unknown, or those without a default are missing.
    """
    hints = _hints(kind)
    if unknown := sorted(set(values) - set(hints)):
        raise ValueError(f"{kind.__name__} has no {unknown}; it has {sorted(hints)}")
    none = dataclasses.MISSING
    needed = {f.name for f in dataclasses.fields(kind) if f.default is none and f.default_factory is none}
    if missing := sorted(needed - set(values)):
        raise ValueError(f"{kind.__name__} lacks {missing}")
    if issubclass(kind, Settings):
        return kind(**values)
    return kind(**{name: conform(value, hints[name], name) for name, value in values.items()})


def fields_of(value: Any, leaf: Callable[[Any, str], Any] | None = None) -> dict[str, Any]:
    """The fields of a dataclass as JSON types; ``leaf(value, name)`` gives what else there is, or it is an error."""
    return {f.name: _plain(getattr(value, f.name), f.name, leaf) for f in dataclasses.fields(value)}


def _plain(value: Any, name: str, leaf: Callable[[Any, str], Any] | None) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{name}.{k}", leaf) for k, v in value.items()}
    if isinstance(value, Settings) and leaf is None:
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name), f"{name}.{f.name}", leaf) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(v, f"{name}.{i}", leaf) for i, v in enumerate(value)]
    if isinstance(value, Real):  # a number of NumPy
        return int(value) if isinstance(value, Integral) else float(value)
    if leaf is None:
        raise TypeError(f"{name} is a {type(value).__name__}, which JSON cannot represent")
    return leaf(value, name)


def conform(value: Any, hint: Any, name: str) -> Any:
    """Bring a value to the form of an annotation.

    Raises:
        TypeError: it is of another kind; ``name`` and the value are in the message.
        ValueError: it is none of the choices of a ``Literal``, or a nested dataclass refuses it.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _either(value, args, name)
    if origin is Literal:
        if not any(value == a and type(value) is type(a) for a in args):
            raise ValueError(f"{name}={value!r}; use one of {', '.join(map(repr, args))}")
        return value
    kind = origin or hint
    if kind is Any or isinstance(kind, typing.TypeVar):
        return value
    if kind in _SIMPLE:
        wanted, convert, words = _SIMPLE[kind]
        if not isinstance(value, wanted) or (kind is not bool and isinstance(value, bool)):
            raise TypeError(f"{name}={value!r}; use {words}")
        return convert(value)
    if kind is torch.dtype:
        dtype = getattr(torch, value, None) if isinstance(value, str) else value
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{name}={value!r}; use a torch.dtype")
        return dtype
    if kind is tuple or kind in (Sequence, Iterable, list):
        return _row(value, args, name)
    if kind in (Mapping, dict):
        return _table(value, args, name)
    if kind is Callable:
        if not callable(value):
            raise TypeError(f"{name}={value!r}; use a function")
        return value
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _from_mapping(kind, value)
    if isinstance(value, torch.Tensor) and getattr(kind, "__module__", "") == "numpy":  # as files hold arrays
        return value.numpy()
    if isinstance(kind, type) and not isinstance(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}; use {kind.__name__}")
    return value


def _from_mapping(kind: Any, value: Mapping[str, Any]) -> Any:
    return kind.from_dict(value) if issubclass(kind, Settings) else make(kind, value)


_SIMPLE: dict[Any, tuple[type[Any], Callable[[Any], Any], str]] = {
    bool: (bool, bool, "True or False"),
    int: (Integral, int, "a whole number"),
    float: (Real, float, "a number"),
    str: (str, str, "a text"),
    type(None): (type(None), lambda value: None, "None"),
}


def _either(value: Any, hints: tuple[Any, ...], name: str) -> Any:
    errors: list[Exception] = []
    for hint in hints:
        if hint is type(None):
            if value is None:
                return None
            continue
        try:
            return conform(value, hint, name)
        except (TypeError, ValueError) as error:
            # Its traceback would hold this frame, and so itself and all that the callers' frames hold.
            errors.append(error.with_traceback(None))
    if type(None) not in hints and len(errors) == 1:
        raise errors[0]
    ways = [str(error).partition("; use ")[2] or str(error) for error in errors]
    ways += ["None"] if type(None) in hints else []
    kind = ValueError if any(isinstance(error, ValueError) for error in errors) else TypeError
    raise kind(f"{name}={value!r}; use {', or '.join(ways)}")


def _row(value: Any, hints: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        raise TypeError(f"{name}={value!r} is one string; use a tuple, such as ({value!r},)")
    if not isinstance(value, tuple | list | range):
        raise TypeError(f"{name}={value!r}; use a tuple")
    if not hints:
        return tuple(value)
    if len(hints) == 1 or hints[-1] is Ellipsis:
        hints = (hints[0],) * len(value)
    if len(hints) != len(value):
        raise ValueError(f"{name}={value!r}; use {len(hints)} values")
    return tuple(conform(v, h, f"{name}[{i}]") for i, (v, h) in enumerate(zip(value, hints, strict=True)))


def _table(value: Any, hints: tuple[Any, ...], name: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}={value!r}; use a mapping")
    of_key, of_value = hints or (Any, Any)
    result = {}
    for key, item in value.items():
        if of_key is int and isinstance(key, str) and key.lstrip("-").isdecimal():  # JSON's keys are text
            key = int(key)
        result[conform(key, of_key, f"a key of {name}")] = conform(item, of_value, f"{name}[{key!r}]")
    return result


_KNOWN: weakref.WeakKeyDictionary[type[Any], dict[str, Any]] = weakref.WeakKeyDictionary()


def _hints(kind: type[Any]) -> dict[str, Any]:
    """Annotations of the fields of a dataclass, by name."""
    if kind not in _KNOWN:
        hints = typing.get_type_hints(kind)
        _KNOWN[kind] = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    return _KNOWN[kind]
