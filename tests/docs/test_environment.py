"""The page of environment variables lists what the code reads, no more and no less."""

import re

READ = [
    r"environ(?:\.get|\.setdefault|\.pop)?[\(\[]\s*[\"']([A-Z][A-Z0-9_]+)[\"']",
    r"getenv\(\s*[\"']([A-Z][A-Z0-9_]+)[\"']",
    r"[\"']([A-Z][A-Z0-9_]+)[\"'] (?:not )?in os\.environ",
]


def variables(text: str) -> set[str]:
    return {name for pattern in READ for name in re.findall(pattern, text)}


def test_page_lists_what_is_read(files, root):
    page = (root / "docs" / "environment.md").read_text()
    listed = set(re.findall(r"^\| `([A-Z][A-Z0-9_]+)`", page, re.MULTILINE))
    sources = [f for f in files if f.suffix in {".py", ".c", ".h"} and ("src" in f.parts or f.name == "conftest.py")]
    read = {name for f in sources if "tests" not in f.parts for name in variables(f.read_text())}
    assert read <= listed, f"missing on the page: {read - listed}"
    # Read by libraries below eff, listed because eff's behaviour hangs on them.
    below = set(re.findall(r"^\| `([A-Z][A-Z0-9_]+)` \| (?:torch|transformers|Triton)\b", page, re.MULTILINE))
    assert listed - below <= read, f"no longer read: {listed - below - read}"


def test_reads_are_found():
    text = 'os.environ["A_B"]; os.getenv("CC"); environ.get(\n "D1"); getenv("EE"); "FF" in os.environ; {**os.environ}'
    assert variables(text) == {"A_B", "CC", "D1", "EE", "FF"}
