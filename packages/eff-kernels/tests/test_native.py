import ctypes
import struct
import subprocess

import pytest
import torch
from eff_kernels import int8_linear, int8_static_linear, native
from eff_kernels.native import build
from eff_kernels.ops.int4_linear import api as int4
from eff_kernels.ops.int8_linear import api as int8

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


@pytest.mark.parametrize("load", [native.fallible, native.struct_kernel])
def test_a_struct_of_another_size_is_refused(load):
    """A field more or less in C than in the launcher would be read from memory that nobody wrote."""
    size = ctypes.c_int64.in_dll(native.library(), "eff_rope_takes").value
    assert load("eff_rope", struct.Struct(f"{size // 8}q"))
    for wrong in (size // 8 - 1, size // 8 + 1):
        with pytest.raises(
            native.NativeBuildError, match=rf"eff_rope reads a struct of {size} bytes.* packs {8 * wrong}"
        ):
            load("eff_rope", struct.Struct(f"{wrong}q"))


MOST = {"int8_linear": 133144, "int8_static_linear": 131071}


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("rows", [1, 3])
def test_long_sums_are_exact_up_to_the_limit(name, rows):
    """The largest codes everywhere: the sum of the most columns just fits into int32."""
    k = MOST[name]
    x, scale = torch.full((rows, k), 127.0), torch.tensor([127.0, 127.0])
    weight = torch.stack([torch.full((k,), 127, dtype=torch.int8), torch.full((k,), -127, dtype=torch.int8)])
    if name == "int8_linear":
        found = int8_linear(x, weight, scale, backend="cpu")
    else:
        found = int8_static_linear(x, weight, scale / 127, torch.ones(k), backend="cpu")
    exact = 127.0 * 127.0 * k
    assert torch.equal(found, torch.tensor([[exact, -exact]]).repeat(rows, 1))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", MOST)
def test_longer_sums_are_refused(name, backend, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    k = MOST[name] + 1
    x, weight, scale = torch.zeros(1, k), torch.zeros(1, k, dtype=torch.int8), torch.ones(1)
    if name == "int8_linear":
        explain = lambda group: int8.OP.explain(x, weight, scale, None, 0.0, False, "dynamic", group, x.dtype)  # noqa: E731
        assert explain(131072).reasons[backend] is None
        assert explain(None).chosen == "reference"
        reason = explain(None).reasons[backend]
    else:
        explanation = int4.OP.explain(x, weight, scale, None, torch.ones(k), x.dtype)
        reason = explanation.reasons[backend]
        assert explanation.chosen == "reference"
    assert f"up to {MOST[name]} products" in reason


def test_beyond_the_limit_auto_is_still_exact():
    k = 2 * MOST["int8_linear"]
    weight = torch.full((1, k), 127, dtype=torch.int8)
    found = int8_linear(torch.full((1, k), 127.0, dtype=torch.float64), weight, torch.tensor([127.0]))
    assert found.item() == 127.0 * 127.0 * k


@pytest.mark.parametrize("harm", ["cut", "without its checksum"])
def test_a_damaged_library_is_compiled_again(harm, tmp_path, monkeypatch):
    """Calling into a library that was cut would end the process."""
    monkeypatch.setenv("EFF_CACHE_DIR", str(tmp_path))
    built = []

    def compile_(command, flags, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"code" * 1000)
        build._stamp(path).write_text(build._digest(path))
        built.append(path)
        raise build.NativeBuildError("far enough")

    monkeypatch.setattr(build, "_compile", compile_)
    load = lambda: build.library.__wrapped__()  # noqa: E731
    with pytest.raises(build.NativeBuildError, match="far enough"):
        load()
    assert build._whole(built[0])
    if harm == "cut":
        built[0].write_bytes(built[0].read_bytes()[:-1])
    else:
        build._stamp(built[0]).unlink()
    with pytest.raises(build.NativeBuildError, match="far enough"):
        load()
    assert len(built) == 2


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(p.name for p in build._SOURCES.glob("*.c")))
def test_sources_compile_without_a_warning(source):
    """The compiler sees loops that run past an array, which do no harm where they happen to end."""
    command = [
        *build._compiler(),
        *build._FLAGS,
        "-O2",
        "-Werror",
        "-c",
        str(build._SOURCES / source),
        "-o",
        "/dev/null",
    ]
    done = subprocess.run([c for c in command if c != "-shared"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
