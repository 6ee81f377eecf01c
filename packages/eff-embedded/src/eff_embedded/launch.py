"""Starting an app whose libraries are not installed yet: through uv inside the workspace, else with a word on how.

The workspace's default environment is light. A command that needs more restarts itself with the extra that brings
it, if uv started it; nothing is downloaded behind the back of an environment that is managed in another way.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

WORKSPACE = "eff-workspace"
MARK = "EFF_RELAUNCHED"


def missing(modules: Iterable[str]) -> list[str]:
    """Those of the modules (top-level names) that are not installed. None of them is imported."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def workspace() -> Path | None:
    """Root of the workspace that the current folder or the environment lies in, or None."""
    for start in (Path.cwd(), Path(sys.prefix)):
        for folder in (start, *start.parents):
            try:
                project = tomllib.loads((folder / "pyproject.toml").read_text()).get("project", {})
            except (OSError, ValueError):
                continue
            if project.get("name") == WORKSPACE:
                return folder
    return None


def ensure(modules: Iterable[str], *, command: str, argv: Sequence[str], extra: str, install: str) -> None:
    """Return if all modules are installed. If not, start ``command argv`` again with them, or say what to install.

    Args:
        modules: Top-level names that the command is about to import.
        command: Name of the program, as in ``uv run PROGRAM``.
        argv: Its arguments.
        extra: Extra of the workspace that brings the modules.
        install: What to install outside the workspace, as pip spells it.

    Raises:
        SystemExit: they are missing and uv did not start this process inside the workspace, or missing even with the
            extra, or this process is one of several that torchrun started. The message names them.
    """
    absent = missing(modules)
    if not absent:
        return
    uv, root = os.environ.get("UV"), workspace()
    names = ", ".join(absent)
    if MARK in os.environ:
        raise SystemExit(f"{command}: {names} missing although the extra {extra!r} is installed")
    if not uv or root is None:
        raise SystemExit(f"{command}: {names} not installed; get what this needs with: pip install '{install}'")
    again = ["uv", "run", "--extra", extra, command, *argv]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SystemExit(f"{command}: {names} not installed; run once without torchrun: {shlex.join(again)}")
    sys.stderr.write(f"{names} not installed, starting again as: {shlex.join(again)}\n")
    sys.stderr.flush()
    os.execve(uv, [uv, "run", "--project", str(root), *again[2:]], {**os.environ, MARK: "1"})
