import copy
import dataclasses
import gc
import json
import pickle
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from eff_kernels.edit import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner(Settings):
    size: int = 3

    def check(self):
        if self.size < 1:
            raise ValueError(f"size={self.size}; use 1 or more")


@dataclass(frozen=True, slots=True)
class Plain:
    columns: tuple[int, ...]
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer(Settings):
    version: ClassVar[int] = 2
    tags: ClassVar[Mapping[str, str]] = {"method": "outer"}

    mode: Literal["a", "b"] = "a"
    count: int = 1
    scale: float | None = None
    names: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    flag: bool = False
    dtype: torch.dtype | None = None
    inner: Inner = Inner()
    maybe: Inner | None = None
    table: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    plain: Mapping[str, Plain] = dataclasses.field(default_factory=dict)
    free: Literal["min", "mean"] | float = "min"
    function: Literal["relu"] | Callable[[float], float] = "relu"

    @classmethod
    def upgrade(cls, values, version):
        values["count"] = values.pop("number")
        return values


FULL = Outer(
    mode="b", count=4, scale=1, names=["x", "y"], pair=[3, 4], flag=True, dtype="bfloat16", inner={"size": 5},
    maybe=Inner(size=2), table={7: [1, 2]}, plain={"q": Plain((1, 2), 0.5)}, free=0.25,
)  # fmt: skip


def test_values_take_the_form_of_their_annotation():
    assert FULL.names == ("x", "y")
    assert FULL.pair == (3, 4.0)
    assert isinstance(FULL.scale, float)
    assert FULL.dtype is torch.bfloat16
    assert FULL.inner == Inner(size=5)
    assert FULL.table == {7: (1, 2)}
    assert type(Outer(count=np.int64(3)).count) is int
    assert type(Outer(scale=np.float32(0.5)).scale) is float


def test_round_trip_through_json_text():
    values = json.loads(json.dumps(FULL.to_dict()))
    assert values["method"] == "outer"
    assert values["version"] == 2
    assert values["dtype"] == "bfloat16"
    assert Outer.from_dict(values) == FULL
    assert Outer.from_dict({}) == Outer()


def test_copies_and_pickles():
    assert copy.deepcopy(FULL) == pickle.loads(pickle.dumps(FULL)) == dataclasses.replace(FULL) == FULL
    assert Outer.__slots__
    assert not hasattr(FULL, "__dict__")
    assert hash(Inner()) == hash(Inner())


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"mode": "c"}, ValueError, "mode='c'; use one of 'a', 'b'"),
        ({"count": 16.0}, TypeError, "count=16.0; use a whole number"),
        ({"count": True}, TypeError, "count=True; use a whole number"),
        ({"scale": "1"}, TypeError, "scale='1'; use a number, or None"),
        ({"names": "x"}, TypeError, "names='x'; use a tuple, such as|names='x' is one string"),
        ({"names": (1,)}, TypeError, r"names\[0\]=1; use a text"),
        ({"pair": (1,)}, ValueError, r"pair=\(1,\); use 2 values"),
        ({"flag": 1}, TypeError, "flag=1; use True or False"),
        ({"dtype": "half"}, None, ""),
        ({"dtype": "no_dtype"}, TypeError, "dtype='no_dtype'; use a torch.dtype, or None"),
        ({"inner": {"size": 0}}, ValueError, "size=0; use 1 or more"),
        ({"inner": {"sizes": 1}}, ValueError, r"Inner has no \['sizes'\]; it has \['size'\]"),
        ({"inner": 3}, TypeError, "inner is a int; use Inner"),
        ({"table": {"x": ()}}, TypeError, "a key of table='x'; use a whole number"),
        ({"table": [1]}, TypeError, "use a mapping"),
        ({"plain": {"q": {"columns": [1]}}}, ValueError, r"Plain lacks \['share'\]"),
        ({"free": "max"}, ValueError, "free='max'; use one of 'min', 'mean', or a number"),
        ({"function": 3}, ValueError, "function=3; use one of 'relu', or a function"),
        ({"colour": 1}, ValueError, r"Outer has no \['colour'\]"),
        ({"method": "other"}, ValueError, "method='other'; Outer reads 'outer'"),
        ({"version": 3}, ValueError, "Outer of version 3; this release reads versions 1 to 2"),
        ({"version": "2"}, ValueError, "Outer of version '2'"),
        ([1], TypeError, "Outer is read from a mapping, got list"),
    ],
)
def test_errors_name_what_was_wrong(values, error, words):
    if error is None:
        Outer.from_dict(values)
        return
    with pytest.raises(error, match=words):
        Outer.from_dict(values)


def test_an_earlier_version_is_turned_into_this_one():
    assert Outer.from_dict({"version": 1, "number": 9}) == Outer(count=9)


def test_required_values_are_named():
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Needs(Settings):
        width: int

    with pytest.raises(ValueError, match=r"Needs lacks \['width'\]"):
        Needs.from_dict({})
    assert Needs.from_dict({"width": 2}).width == 2


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(TypeError, match="function is a builtin_function_or_method, which JSON cannot represent"):
        Outer(function=abs).to_dict()


def test_what_a_caller_holds_is_free_after_a_form_did_not_fit():
    class Held:
        pass

    def call():
        held = Held()
        assert Outer().dtype is None  # not of the first form, a dtype
        return weakref.ref(held)

    gc.disable()  # it would find the circle in time
    try:
        assert call()() is None
    finally:
        gc.enable()
