"""What faults are planted in: each op of eff-kernels, each method and the engine of eff-serve; sources and tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NATIVE = "packages/eff-kernels/src/eff_kernels/native/src"
C_FILES = {  # besides the one that is called like the op
    "block_sparse_attention": ("block_sparse.c", "attention_tile.h"),
    "decode_attention": ("decode_block.h",),
    "fp8_quantize": ("fp8_rows.c", "fp8.h"),
    "int8_linear": ("int8_tile.h",),
    "int8_quantize": ("int8_rows.c", "int8_columns.c"),
    "neighborhood_attention": (
        "neighborhood.c",
        "neighborhood.h",
        "neighborhood_backward.c",
        "neighborhood_tile.c",
        "neighborhood_unfused.c",
    ),
    "sparse_linear_attention": ("linear_attention.c",),
}
TESTS = {
    "neighborhood_attention": "test_neighborhood_*.py",
    "sparse_linear_attention": "test_sparse_linear_*.py",
}
NOT_METHODS = {"specs.py", "__init__.py", "files.py"}


@dataclass(frozen=True)
class Unit:
    """An op or a method."""

    package: str
    name: str
    sources: tuple[str, ...]
    tests: tuple[str, ...]

    @property
    def label(self) -> str:
        """Such as "quant/fp4"."""
        return f"{self.package}/{self.name}"


def units(root: Path) -> list[Unit]:
    """All of them, in a fixed order; paths are relative to ``root``."""
    found = []
    tests = root / "packages/eff-kernels/tests"
    for folder in _folders(root / "packages/eff-kernels/src/eff_kernels/ops"):
        name = folder.name
        paths = [
            *_python(folder),
            *(root / NATIVE).glob(f"{name}.c"),
            *(root / NATIVE / f for f in C_FILES.get(name, ())),
        ]
        seen = sorted((tests / "ops").glob(TESTS.get(name, f"test_{name}.py")))
        found.append(_unit(root, "kernels", name, paths, seen))
    edit = root / "packages/eff-kernels/src/eff_kernels/edit"
    found.append(_unit(root, "kernels", "edit", [*_python(edit), *_python(edit / "attention")], [tests / "edit"]))
    for package in ("attention", "quant", "adapters", "guidance", "vision"):
        home = root / f"packages/eff-{package}"
        for folder in _folders(home / f"src/eff_{package}"):
            if (home / "tests" / folder.name).is_dir():
                paths = [p for p in folder.rglob("*.py") if p.name not in NOT_METHODS]
                found.append(_unit(root, package, folder.name, paths, [home / "tests" / folder.name]))
        shared = [p for p in _python(home / f"src/eff_{package}") if p.stat().st_size > 3000]
        if shared:  # parts of many methods are tested with them
            tests = home / "tests"
            files = sorted(tests.glob("test_*.py")) if package == "quant" else [tests]
            found.append(_unit(root, package, "shared", shared, files))
    home = root / "apps/eff-serve"
    engine = home / "src/eff_serve/engine"
    found.append(_unit(root, "serve", "engine", [*_python(engine), *_python(engine / "gguf")], [home / "tests/engine"]))
    return found


def _folders(home: Path) -> list[Path]:
    return sorted(p for p in home.iterdir() if (p / "__init__.py").is_file())


def _python(folder: Path) -> list[Path]:
    return [p for p in folder.glob("*.py") if p.name not in NOT_METHODS]


def _unit(root: Path, package: str, name: str, sources: list[Path], tests: list[Path]) -> Unit:
    relative = [tuple(sorted(str(p.relative_to(root)) for p in paths)) for paths in (sources, tests)]
    return Unit(package, name, *relative)
