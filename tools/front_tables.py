"""Makes the tables of packages and methods in README.md and docs/index.md from the code.

    python tools/front_tables.py [--check]

A package's line is the description in its pyproject.toml; what a method does is the first line of its docstring; what
was found is in tools/methods.toml. Tables stand between comments that name them.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/index.md")
INSTALL = {  # the extras that most people want
    "eff-kernels": "native",
    "eff-quant": "native,transformers",
    "eff-attention": "native,transformers",
    "eff-adapters": "transformers,peft",
    "eff-guidance": "diffusers",
    "eff-embedded": "language,vision,sprites,diffusion",
}
ORDER = ("kernels", "quant", "attention", "adapters", "guidance", "vision", "embedded", "serve", "studio", "train")


def packages(page: Path) -> str:
    """Packages and apps, what they are, how to install them."""
    lines = ["| package | what it is | install |", "| --- | --- | --- |"]
    for short in ORDER:
        folder = next(p for p in (ROOT / "packages" / f"eff-{short}", ROOT / "apps" / f"eff-{short}") if p.exists())
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        name = project["name"]
        extras = f"[{INSTALL[name]}]" if name in INSTALL else ""
        install = (
            f'`pip install "{name}{extras}"`' if folder.parent.name == "packages" else f"`uv run {name}` in a clone"
        )
        lines.append(f"| {link(page, name, folder / 'README.md')} | {project['description'].rstrip('.')} | {install} |")
    return "\n".join(lines)


def methods(page: Path) -> str:
    """Methods with what they do and what was found."""
    lines = ["| method | what it does | what we found |", "| --- | --- | --- |"]
    for module, entries in table().items():
        for folder, entry in entries.items():
            name = link(page, entry["name"], ROOT / "docs" / "methods" / f"{entry['page']}.md")
            lines.append(f"| {name}<br>`{module}.{folder}` | {does(module, folder)} | {entry['found']} |")
    return "\n".join(lines)


def table() -> dict[str, dict[str, dict[str, str]]]:
    """What tools/methods.toml holds."""
    return tomllib.loads((ROOT / "tools" / "methods.toml").read_text())


def does(module: str, folder: str) -> str:
    """First line of a method's docstring, without the full stop; numbers of papers become links."""
    file = ROOT / "packages" / module.replace("_", "-") / "src" / module / folder / "__init__.py"
    line = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0].replace("\n", " ").rstrip(".")
    return re.sub(r"(?:arXiv )?(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", line)


def link(page: Path, text: str, target: Path) -> str:
    """A link from a page; pages of the site reach what is outside of docs/ by their text alone."""
    if page.parent.name == "docs" and not target.is_relative_to(ROOT / "docs"):
        return f"`{text}`"
    folder = target.parent if target.name == "README.md" else target
    return f"[{text}]({os.path.relpath(folder, page.parent)})"


def minute(page: Path) -> str:
    """The site's first page shows what README.md shows."""
    text = (ROOT / "README.md").read_text()
    return text.split("## In one minute\n\n")[1].split("\n\n## Methods")[0].replace("](docs/", "](")


def filled(page: Path) -> str:
    """The page with its tables as they are now."""
    text = page.read_text()
    for name, make in (("packages", packages), ("methods", methods), ("minute", minute)):
        start, end = f"<!-- table: {name} -->\n", f"<!-- end: {name} -->"
        if start not in text:
            continue
        before, rest = text.split(start)
        text = f"{before}{start}{make(page)}\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    """Write the tables, or say which page is behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a page is behind the code")
    check = parser.parse_args().check
    for page in (ROOT / name for name in PAGES):
        text = filled(page)
        if check and text != page.read_text():
            raise SystemExit(f"{page.relative_to(ROOT)} is behind the code: run python tools/front_tables.py")
        if not check:
            page.write_text(text)


if __name__ == "__main__":
    main()
