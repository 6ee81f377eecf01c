"""Which recipes there are, read from their source without importing them, and loading one by name or file."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eff_train.frame.recipe import Recipe

FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Entry:
    """A recipe: its name on the command line, its module, and the first line of its docstring."""

    name: str
    module: str
    summary: str


def recipes() -> dict[str, Entry]:
    """All recipes of the package by name, sorted. ``a_b/c.py`` is named ``a-b/c``, ``a_b/__init__.py`` is ``a-b``."""
    found = {}
    for path in sorted(FOLDER.rglob("*.py")):
        tree = ast.parse(path.read_text())
        if not any(_assigns_recipe(node) for node in tree.body):
            continue
        parts = path.relative_to(FOLDER).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        name = "/".join(parts).replace("_", "-")
        summary = (ast.get_docstring(tree) or "").partition("\n\n")[0].replace("\n", " ")
        found[name] = Entry(name, ".".join(("eff_train.recipes", *parts)), summary)
    return dict(sorted(found.items()))


def load(name: str) -> type[Recipe[Any]]:
    """The recipe class of a name, or of a Python file that assigns one to ``RECIPE``.

    Raises:
        ValueError: there is no such recipe.
    """
    from eff_train.frame.recipe import Recipe

    if name.endswith(".py"):
        module = _load_file(Path(name))
    elif name in (known := recipes()):
        module = importlib.import_module(known[name].module)
    else:
        raise ValueError(f"no recipe {name!r}; there are {', '.join(known)}, or give a file that ends with .py")
    recipe = getattr(module, "RECIPE", None)
    if not (isinstance(recipe, type) and issubclass(recipe, Recipe)):
        raise ValueError(f"{name} does not assign a subclass of Recipe to RECIPE, but {recipe!r}")
    return recipe


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"no file {path}")
    name = f"eff_train_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name to resolve annotations.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _assigns_recipe(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "RECIPE" for t in node.targets)
