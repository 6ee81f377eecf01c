"""House rules that no linter checks: size of files, plain text, docstrings on what a package exports."""

import importlib
import inspect
import re

MOST_LINES = 400
TEXT = {".py", ".c", ".h", ".md", ".toml", ".yml", ".js", ".css", ".html", ".jinja"}


def test_no_file_is_long(files, root):
    long = {}
    for path in files:
        if path.suffix in TEXT and (lines := len(path.read_text().splitlines())) > MOST_LINES:
            long[str(path.relative_to(root))] = lines
    assert long == {}


def test_sources_are_ascii(files, root):
    """Code and pages are ASCII; tests may hold any text, as they check how it is handled."""
    offenders = [
        str(path.relative_to(root))
        for path in files
        if path.suffix in TEXT and "tests" not in path.parts and not path.read_text().isascii()
    ]
    assert offenders == []


def test_todo_names_an_issue(files, root):
    for path in files:
        if path.suffix in TEXT:
            bare = re.findall(r".*\bTO" + r"DO\b(?!\(#\d+\)).*", path.read_text())
            assert not bare, f"{path.relative_to(root)}: {bare}"


def test_exported_names_are_documented(member):
    """Each name in an ``__all__`` exists and has a docstring of its own."""
    missing, seen = [], 0
    for path in sorted(member.source.rglob("__init__.py")):
        name = ".".join(path.relative_to(member.source.parent).parent.parts)
        module = importlib.import_module(name)
        assert (module.__doc__ or "").strip(), f"{name} has no docstring"
        for exported in getattr(module, "__all__", ()):
            seen += 1
            value = getattr(module, exported)
            documented = inspect.isclass(value) or inspect.isroutine(value)
            if documented and not (vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__):
                missing.append(f"{name}.{exported}")
    assert missing == []
    assert seen or member.name == "eff-serve", f"{member.name} exports nothing"
