"""Where installed packages keep their files."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def package_folder(module: str, *, install: str) -> Path:
    """Folder of an installed package, found without importing it.

    Args:
        module: Name as in ``import``.
        install: What to ask pip for when the package is missing.

    Raises:
        ImportError: the package is not installed.
    """
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"the package {module!r} is not installed; pip install {install!r}", name=module)
    return Path(found.submodule_search_locations[0])


def package_file(module: str, *parts: str, install: str) -> Path:
    """A file of an installed package.

    Raises:
        ImportError: the package is not installed.
        FileNotFoundError: this version of it lacks the file.
    """
    path = package_folder(module, install=install).joinpath(*parts)
    if not path.is_file():
        raise FileNotFoundError(f"{module} is installed but lacks {'/'.join(parts)}; pip install -U {install!r}")
    return path
