"""Links between pages, and from pages to files, lead somewhere; the site shows every page."""

import re
from pathlib import Path

import pytest
import yaml

LINK = re.compile(
    r"(?<!!)\[[^\]\n]*\]\((?P<target>[^)\s]+)\)|<img[^>]*src=\"(?P<image>[^\"]+)\"|!\[[^\]]*\]\((?P<picture>[^)\s]+)\)"
)


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as the site and code hosts make them."""
    titles = re.findall(r"^#+\s+(.+?)\s*$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    plain = [re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", t) for t in titles]
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", t.lower()).strip()) for t in plain}


def broken_links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    broken = []
    for m in LINK.finditer(text):
        target = m["target"] or m["image"] or m["picture"]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file.read_text())):
            broken.append(target)
    return broken


def test_relative_links_resolve(page):
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("# A b\n[x](b.md) [y](a.md#a-b) [z](a.md#c) [w](https://example.org) `[no](no.md)` ![p](p.png)\n")
    assert broken_links(page) == ["b.md", "a.md#c", "p.png"]


@pytest.fixture(scope="module")
def site(root) -> dict:
    return yaml.safe_load((root / "mkdocs.yml").read_text())


def pages_of(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [p for entry in (nav.values() if isinstance(nav, dict) else nav) for p in pages_of(entry)]


def test_navigation_lists_each_page_once(site, files, root):
    listed = pages_of(site["nav"])
    docs = root / "docs"
    written = {str(f.relative_to(docs)) for f in files if f.is_relative_to(docs) and f.suffix == ".md"}
    assert set(listed) == written
    assert len(listed) == len(set(listed))


def test_reference_covers_each_member(site, all_members, root):
    """Pages with ``::: module`` show all that a package exports."""
    shown = set()
    for path in sorted((root / "docs").rglob("*.md")):
        shown |= set(re.findall(r"^::: ([\w.]+)", path.read_text(), re.MULTILINE))
    for m in all_members:
        if m.folder.parent.name == "packages":
            packages = {m.module} | {f"{m.module}.{p.parent.name}" for p in m.source.glob("*/__init__.py")}
            internal = {f"{m.module}.native", f"{m.module}.ops"}
            assert not (packages - internal - shown), f"add reference pages for {packages - internal - shown}"


def test_site_has_only_the_two_plugins(site):
    """Other plugins would tie the pages to one site generator."""
    assert {p if isinstance(p, str) else next(iter(p)) for p in site["plugins"]} == {"search", "mkdocstrings"}
