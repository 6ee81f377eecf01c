"""Code in README and pages runs: Python blocks in order, page by page; programs and sessions in commands exist.

A block that cannot run in a test has a comment right before it that says why: ``<!-- not run: needs a GPU -->``.
"""

import ast
import re
import shlex
import tomllib

import pytest

PROGRAMS = {
    "cd",
    "curl",
    "export",
    "git",
    "pip",
    "uv",
    "uvx",
    "eff-serve",
    "eff-studio",
    "eff-train",
    "python",
    "torchrun",
}
LANGUAGES = {"python", "bash", "text", "json", "toml", "yaml", "c", "console", "html"}


def script(blocks) -> str:
    """The Python blocks of a page as one program, each at its own line, so that errors name the line of the page."""
    lines: list[str] = []
    for block in blocks:
        if block.language == "python" and not block.reason:
            lines += [""] * (block.line - 1 - len(lines))
            lines += block.code.splitlines()
    return "\n".join(lines)


def test_blocks_name_their_language(page, blocks_of):
    assert {b.language for b in blocks_of(page)} <= LANGUAGES


def test_python_blocks_are_valid(page, blocks_of):
    for block in blocks_of(page):
        if block.language == "python":
            ast.parse(block.code, f"{page}:{block.line}")


def test_python_blocks_run(page, blocks_of, run_python, tmp_path):
    code = script(blocks_of(page))
    if code.strip():
        run = f"exec(compile({code!r}, {str(page)!r}, 'exec'), {{'__name__': '__main__'}})"
        run_python(f"import torch; torch.set_num_threads(1); {run}", cwd=tmp_path, timeout=300)


def commands(code: str) -> list[list[str]]:
    """The commands of a bash block, continued lines joined, without comments and without the values of heredocs."""
    joined = re.sub(r"\\\n\s*", " ", code)
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def unknown_parts(words: list[str], sessions: set[str], members: set[str]) -> list[str]:
    """What is wrong with a command: the program, the nox session or the package is not known."""
    words = [w for w in words if not re.fullmatch(r"[A-Z_]+=.*", w)]
    program, rest = words[0], words[1:]
    if program == "uv" and rest[:1] == ["run"]:
        return unknown_parts([w for w in rest[1:] if not w.startswith("--")], sessions, members) if rest[1:] else []
    if program == "uvx" and rest[:1] == ["nox"]:
        named = [rest[i + 1] for i, w in enumerate(rest[:-1]) if w == "-s"]
        return [f"nox session {n}" for n in named if n not in sessions]
    if program == "pip" and rest[:1] == ["install"]:
        named = [re.split(r"[\[<>=]", w)[0] for w in rest[1:] if not w.startswith("-")]
        return [f"package {n}" for n in named if n.startswith("eff-") and n not in members]
    return [] if program in PROGRAMS or program.endswith(".py") else [f"program {program}"]


@pytest.fixture(scope="module")
def nox_sessions(root) -> set[str]:
    """Names that ``nox -s`` takes, read from the noxfile's syntax (nox itself is not in the test environment)."""
    tree = ast.parse((root / "noxfile.py").read_text())
    names = set()
    ids = [p.parent.name.removeprefix("eff-") for p in root.glob("*/*/pyproject.toml")]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            marks = [ast.unparse(d) for d in node.decorator_list]
            if any(m.startswith("nox.session") for m in marks):
                names.add(node.name)
                names |= {f"{node.name}({i})" for i in ids if "each_target" in marks or "each_member" in marks}
                names |= {f"{node.name}(workspace)"} if "each_target" in marks else set()
    return names


def test_commands_are_known(page, blocks_of, nox_sessions, all_members):
    for block in blocks_of(page):
        if block.language == "bash" and not block.reason:
            for words in commands(block.code):
                wrong = unknown_parts(words, nox_sessions, {m.name for m in all_members})
                assert not wrong, f"line {block.line}: {wrong} in {' '.join(words)}"


def test_dependency_groups_of_the_noxfile_exist(root):
    groups = set(tomllib.loads((root / "pyproject.toml").read_text())["dependency-groups"])
    named = re.findall(r"--(?:only-)?group=(\w[\w-]*)\"", (root / "noxfile.py").read_text())
    assert named
    assert set(named) <= groups


PAGE = """Text
```python
x = 1
```
<!-- not run: needs a GPU -->
```python
x = 2
```
1. item
   ```python
   print(x)
   raise SystemExit(x)
   ```
"""


def test_runner_keeps_order_lines_and_reasons(blocks_of, run_python):
    code = script(blocks_of(PAGE))
    assert code.splitlines()[2] == "x = 1"
    assert code.splitlines()[10:] == ["print(x)", "raise SystemExit(x)"]
    assert "x = 2" not in code
    with pytest.raises(AssertionError, match="1"):
        run_python(code)


def test_unknown_commands_are_found():
    def check(line):
        return unknown_parts(commands(line)[0], {"tests", "tests(quant)"}, {"eff-quant"})

    assert check("uvx nox -s tests") == []
    assert check('uvx nox -s "tests(quant)" -- -k x') == []
    assert check("uvx nox -s test") == ["nox session test"]
    assert check("pip install 'eff-quant[transformers]>=0.1'") == []
    assert check("pip install eff-quants") == ["package eff-quants"]
    assert check("uv run eff-serve chat") == []
    assert check("uv run eff-serv chat") == ["program eff-serv"]
    assert check("EFF_X=1 frobnicate") == ["program frobnicate"]
