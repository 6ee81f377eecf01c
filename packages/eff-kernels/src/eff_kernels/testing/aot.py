"""The ahead-of-time gate: do Triton kernels compile for real GPUs, without spills, with matrix instructions?

It needs no GPU: Triton's compiler makes cubin and hsaco files for GPUs that are not there. What it shows is that the
code compiles and what it uses; not that it ran.

Convention. A module ``ops/<op>/triton.py`` may have a list ``AOT_CASES`` of `eff_kernels.aot.AotCase`: each names
a kernel, the types of its run-time arguments, the values of its constexprs, and the launch options::

    AOT_CASES = [
        AotCase(
            name="rows-fp16",
            kernel=_rms_norm_fwd_kernel,
            signature={"x_ptr": "*fp16", "weight_ptr": "*fp16", "out_ptr": "*fp16", "d": "i32", "eps": "fp32"},
            constexprs={"BLOCK": 4096, "INTERPRET": False},
            options={"num_warps": 8},
        ),
    ]

`assert_compiles("eff_kernels.ops.rms_norm.triton")` compiles every case for each of its targets and raises with the
whole list of what is wrong. Under ``TRITON_INTERPRET=1`` kernels are no compilable objects, so the module is imported
again in one child process without that variable, which compiles all its cases. Triton's cache (``TRITON_CACHE_DIR``)
makes the second time quick.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from eff_kernels.aot import AotCase
from eff_kernels.op import triton_interprets


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU to compile for; ``shared_limit`` is the most shared memory (LDS) of one program, in bytes."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


TARGETS: Mapping[str, Target] = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}

_CUDA_MMA = re.compile(r"\b(?:tcgen05\.mma|wgmma\.mma_async|mma\.sync)[\w.:]*")
_HIP_MMA = re.compile(r"\bv_mfma\w+")
_INT8_MMA = re.compile(r"\.s8\.s8|\.u8\.u8|kind::i8|_i32_\w*i8")


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one kernel needs on one target.

    Attributes:
        name: Of the case.
        target: Key of `TARGETS`.
        registers: Vector registers of a thread.
        spill: Local memory of a thread in bytes on NVIDIA (the stack; there is none without spills), spilled vector
            registers on AMD. 0 is wanted.
        shared: Shared memory of a program in bytes.
        mma: Names of the matrix instructions in the code, sorted.
    """

    name: str
    target: str
    registers: int
    spill: int
    shared: int
    mma: tuple[str, ...]

    def problems(self, mma: str | None = None) -> list[str]:
        """What is wrong with it: spills, too much shared memory, or no matrix instruction of the kind ``mma``."""
        found = []
        if self.spill:
            unit = "bytes of local memory" if TARGETS[self.target].backend == "cuda" else "vector registers"
            found.append(f"spills {self.spill} {unit} at {self.registers} registers; use smaller blocks or more warps")
        limit = TARGETS[self.target].shared_limit
        if self.shared > limit:
            found.append(f"needs {self.shared} bytes of shared memory, {self.target} has {limit}")
        if mma is not None and not any(mma == "any" or _INT8_MMA.search(name) for name in self.mma):
            kind = "matrix instruction" if mma == "any" else f"{mma} matrix instruction"
            found.append(f"has no {kind}; found {', '.join(self.mma) or 'none at all'}")
        return found


@dataclass(frozen=True, slots=True)
class Failed:
    """A case that does not compile; ``error`` is the compiler's text."""

    name: str
    target: str
    error: str


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: str,
    *,
    name: str = "",
    unaligned: Sequence[str] = (),
    **options: Any,
) -> Compiled:
    """Compile a kernel for a GPU that need not be there.

    Args:
        kernel: Decorated by ``triton.jit``, with or without an autotuner around it.
        signature: Triton's type of each argument that is not a constexpr.
        constexprs: The value of each other argument.
        target: Key of `TARGETS`.
        name: For the result; the kernel's name if empty.
        unaligned: Arguments without the hint "multiple of 16"; without hints Triton does not pipeline loads.
        **options: num_warps, num_stages and the like. FP fusion is on unless ``enable_fp_fusion`` says otherwise.

    Raises:
        RuntimeError: the process runs Triton's interpreter; use `compile_module`.
        ValueError: unknown target, or the arguments do not match the kernel's.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; use {', '.join(TARGETS)}")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime import JITFunction

    while not isinstance(kernel, JITFunction):
        if type(kernel).__name__ == "InterpretedFunction" or not hasattr(kernel, "fn"):
            raise RuntimeError(
                f"{kernel!r} cannot be compiled: triton.jit made it under TRITON_INTERPRET=1, or it is not a kernel; "
                "compile_module compiles in a child process without that variable"
            )
        kernel = kernel.fn
    arguments = list(kernel.arg_names)
    given = {**dict.fromkeys(constexprs, "constexpr"), **signature}
    if set(given) != set(arguments) or set(signature) & set(constexprs):
        raise ValueError(
            f"{kernel.__name__}: arguments without a type or value: {sorted(set(arguments) - set(given))}, unknown: "
            f"{sorted(set(given) - set(arguments))}, given twice: {sorted(set(signature) & set(constexprs))}"
        )
    types = {a: given[a] for a in arguments}
    aligned = (i for i, a in enumerate(arguments) if _may_align(types[a]) and a not in unaligned)
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs=dict(constexprs),
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    gpu = TARGETS[target]
    built = triton.compile(
        source,
        target=GPUTarget(gpu.backend, gpu.arch, gpu.warp_size),
        options={"enable_fp_fusion": True, **options},
    )
    label = name or kernel.__name__
    if gpu.backend == "cuda":
        usage = _cubin_usage(built.asm["cubin"])
        mma = set(_CUDA_MMA.findall(built.asm["ptx"]))
        return Compiled(label, target, usage["REG"], usage["STACK"], built.metadata.shared, tuple(sorted(mma)))
    code = built.asm["amdgcn"]
    mma = set(_HIP_MMA.findall(code))
    registers, spill = (_amd_number(code, key) for key in ("vgpr_count", "vgpr_spill_count"))
    return Compiled(label, target, registers, spill, built.metadata.shared, tuple(sorted(mma)))


def compile_module(source: str | Path, targets: Iterable[str] | None = None) -> list[Compiled | Failed]:
    """Compile every `AotCase` of a module's ``AOT_CASES`` for each of its targets, in a child process.

    Args:
        source: Name of an importable module, or path of a Python file.
        targets: Keep to these; None takes those of each case.

    Raises:
        RuntimeError: the child could not import the module, or it ended early; the message holds what it printed.
    """
    arguments = [sys.executable, "-m", "eff_kernels.testing.aot", str(source), *(targets or ())]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"compiling {source} failed with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    return [_from_json(line) for line in done.stdout.splitlines()]


def assert_compiles(source: str | Path, targets: Iterable[str] | None = None) -> list[Compiled]:
    """Assert that every case of a module compiles on its targets as `Compiled.problems` asks; return the results.

    Raises:
        AssertionError: lists each case and target with what is wrong.
    """
    wanted = {case.name: case.mma for case in aot_cases(load(source))}
    compiled: list[Compiled] = []
    wrong: list[str] = []
    for result in compile_module(source, targets):
        if isinstance(result, Failed):
            wrong.append(f"{result.name} on {result.target} does not compile: {result.error}")
        else:
            compiled.append(result)
            wrong += [f"{result.name} on {result.target} {text}" for text in result.problems(wanted[result.name])]
    if wrong:
        raise AssertionError(f"{len(wrong)} problems in {source}:\n  " + "\n  ".join(wrong))
    return compiled


def aot_cases(module: ModuleType) -> list[AotCase]:
    """The module's ``AOT_CASES``, checked.

    Raises:
        ValueError: there is no such list, it is empty, two names are equal, a target is unknown, or a kernel of the
            module (a function whose name ends in ``_kernel``) has no case.
    """
    cases: list[AotCase] = list(getattr(module, "AOT_CASES", []))
    if not cases:
        raise ValueError(f"{module.__name__} has no AOT_CASES; see eff_kernels.testing.aot for the convention")
    names = [c.name for c in cases]
    if len(set(names)) != len(names):
        raise ValueError(
            f"{module.__name__}: names in AOT_CASES repeat: {sorted({n for n in names if names.count(n) > 1})}"
        )
    unknown = {t for c in cases for t in c.targets} - set(TARGETS)
    if unknown:
        raise ValueError(f"{module.__name__}: unknown targets {sorted(unknown)}; use {', '.join(TARGETS)}")
    kernels = {f.__name__ for f in map(_function, vars(module).values()) if f.__module__ == module.__name__}
    bare = {name for name in kernels if name.endswith("_kernel")} - {_function(c.kernel).__name__ for c in cases}
    if bare:
        raise ValueError(f"{module.__name__}: AOT_CASES has no case of {', '.join(sorted(bare))}")
    return cases


def _function(value: Any) -> Any:
    """The Python function in a kernel, through what Triton wrapped around it; else something without a module."""
    while hasattr(value, "fn"):
        value = value.fn
    return value if inspect.isfunction(value) else _nothing


def _nothing() -> None:
    """Stands for what is no function."""


def load(source: str | Path) -> ModuleType:
    """Import a module by its name, or from the path of a ``.py`` file."""
    path = Path(source)
    if path.suffix != ".py":
        return importlib.import_module(str(source))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _compile_cases(cases: Iterable[AotCase], targets: Sequence[str]) -> Iterator[Compiled | Failed]:
    for case in cases:
        for target in case.targets:
            if targets and target not in targets:
                continue
            try:
                yield compile_for(
                    case.kernel,
                    case.signature,
                    case.constexprs,
                    target,
                    name=case.name,
                    unaligned=case.unaligned,
                    **case.options,
                )
            except Exception as error:
                # The compiler raises many kinds of errors; each is a result, and the other cases still count.
                yield Failed(case.name, target, f"{type(error).__name__}: {error}")


def _may_align(kind: str) -> bool:
    return kind.startswith("*") or kind in ("i32", "i64")


def _cubin_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", done.stdout)}


def _amd_number(code: str, key: str) -> int:
    found = re.search(rf"\.{key}:\s*(\d+)", code)
    if found is None:
        raise RuntimeError(f"Triton's assembly for AMD has no field .{key}")
    return int(found[1])


def _from_json(line: str) -> Compiled | Failed:
    fields = json.loads(line)
    if "error" in fields:
        return Failed(**fields)
    return replace(Compiled(**fields), mma=tuple(fields["mma"]))


def main(arguments: Sequence[str]) -> None:
    """Compile the cases of one module and print one JSON object a line: ``MODULE [TARGET ...]``."""
    source, *targets = arguments
    if triton_interprets():
        raise RuntimeError("TRITON_INTERPRET=1 is set; kernels cannot be compiled in this process")
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # the compiler's own output must not mix with the results
        for result in _compile_cases(aot_cases(load(source)), targets):
            print(json.dumps(asdict(result)), file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
