"""Plant one fault at a time in an op or a method, run the tests that should see it, and note what stays green.

    python tools/faults/plant.py kernels/rope quant            # units or packages; --list names them
    python tools/faults/plant.py quant/fp4 --count 12 --seed 1 # another sample
    python tools/faults/plant.py --again survived              # after tests were mended: the survivors once more
    python tools/faults/plant.py --fill 4 --count 2            # units that have fewer than four faults on record
    python tools/faults/plant.py --report                      # counts by unit from the record, into docs/faults.md

The tree at HEAD is copied, so that the working tree stays as it is; the copy comes first on the path of imports, and C
is compiled from the copy. Libraries are loaded once, and each run of the tests is a fork of that process. A record of
each fault goes to results.jsonl; a fault that is there already is not planted again. verdicts.toml says of survivors
that they change nothing that a user could see ("equivalent"), which test finds them now ("mended", where they were not
planted again), or why none does yet ("open").
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from pathlib import Path

import kinds
import units

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS, VERDICTS, BY_HAND = HERE / "results.jsonl", HERE / "verdicts.toml", HERE / "by_hand.toml"
ENVIRONMENT = {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
LIBRARIES = {
    "kernels": ("triton", "torch._dynamo"),
    "attention": ("triton", "transformers.modeling_utils", "transformers.models.llama.modeling_llama"),
    "quant": ("triton", "transformers.modeling_utils", "transformers.models.llama.modeling_llama", "peft"),
    "adapters": ("transformers.modeling_utils", "transformers.models.llama.modeling_llama"),
    "guidance": ("transformers.modeling_utils", "diffusers.models.transformers.transformer_sd3"),
    "vision": ("numpy", "scipy", "torchvision"),
    "serve": ("transformers.modeling_utils", "transformers.models.llama.modeling_llama"),
}
SURVIVED, FOUND, LATE, BROKEN = "survived", "found", "too long", 70
PAGE, MARKS = ROOT / "docs/faults.md", ("<!-- faults -->", "<!-- end faults -->")


@dataclasses.dataclass(frozen=True)
class Planted:
    """A fault in its place, and what it says in a record."""

    unit: units.Unit
    path: str
    kind: str
    line: int
    before: str
    after: str
    text: str = dataclasses.field(repr=False)

    @property
    def key(self) -> str:
        """Names the fault as long as its line stays as it is."""
        return hashlib.sha256(f"{self.path}|{self.kind}|{self.before}|{self.after}".encode()).hexdigest()[:12]


def sample(root: Path, unit: units.Unit, count: int, seed: int) -> list[Planted]:
    """Faults of a unit: those written by hand, then ``count`` in Python, half as many in Triton and in C."""
    python, triton, c = [], [], []
    for path in unit.sources:
        text = (root / path).read_text()
        if not path.endswith(".py"):
            c += [(path, f) for f in kinds.in_c(text)]
        elif Path(path).name.startswith("triton"):
            triton += [(path, f) for f in kinds.in_python(text)]
        else:
            python += [(path, f) for f in kinds.in_python(text)]
    chosen = kinds.balanced_sample(python, count, f"{seed} {unit.label}")
    chosen += kinds.balanced_sample(triton, (count + 1) // 2, f"{seed} {unit.label} Triton")
    chosen += kinds.balanced_sample(c, (count + 1) // 2, f"{seed} {unit.label} C")
    found = []
    for wish in tomllib.loads(BY_HAND.read_text()).get(unit.package, {}).get(unit.name, []):
        text = (root / wish["file"]).read_text()
        if text.count(wish["old"]) == 1:  # else it was planted in other lines, which a test asks for
            line = text.count("\n", 0, text.index(wish["old"])) + 1
            found.append(_planted(unit, wish["file"], wish["kind"], text, text.replace(wish["old"], wish["new"]), line))
    for path, fault in chosen:
        text = (root / path).read_text()
        found.append(_planted(unit, path, fault.kind, text, kinds.apply(text, fault), kinds.line_of(text, fault)))
    return found


def replanted(root: Path, unit: units.Unit, record: dict) -> Planted | None:
    """The fault of a record in the present text, where its lines still stand; None where they do not."""
    text = (root / record["path"]).read_text()
    lines = text.splitlines()
    found = [
        (abs(first + 1 - record["line"]), first, last)
        for first in range(len(lines))
        for last in range(first + 1, min(first + 30, len(lines)) + 1)
        if " ".join(s.strip() for s in lines[first:last]) == record["before"]
    ]
    if not found:
        return None
    _, first, last = min(found)
    indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
    new = "\n".join([*lines[:first], indent + record["after"], *lines[last:]]) + "\n"
    return Planted(unit, record["path"], record["kind"], first + 1, record["before"], record["after"], new)


def _planted(unit: units.Unit, path: str, kind: str, text: str, new: str, line: int) -> Planted:
    before, after = text.splitlines(), new.splitlines()
    tail = len(after) - len(before)
    last = next(i for i in range(1, len(before) + 1) if before[-i] != after[-i] or len(before) - i == line - 1)
    old = " ".join(s.strip() for s in before[line - 1 : len(before) - last + 1])
    now = " ".join(s.strip() for s in after[line - 1 : len(before) - last + 1 + tail])
    return Planted(unit, path, kind, line, old, now, new)


class Tree:
    """A copy of the tree at a commit in which tests run."""

    def __init__(self, folder: Path, at: str) -> None:
        self.folder, self.clock = folder, time.time()
        archive = subprocess.Popen(["git", "-C", str(ROOT), "archive", at], stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", str(folder)], stdin=archive.stdout, check=True)
        archive.wait()
        git = ["git", "-C", str(ROOT), "rev-parse", "--short=12", at]
        self.commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()

    def write(self, path: str, text: str) -> None:
        """Write a file with a time of its own: compiled modules are keyed by the second and the size."""
        (self.folder / path).write_text(text)
        self.clock += 2
        os.utime(self.folder / path, (self.clock, self.clock))

    def compiles(self, path: str) -> bool:
        """Whether the C file, or those that include the header, are still C."""
        sources = (self.folder / units.NATIVE).glob("*.c") if path.endswith(".h") else [self.folder / path]
        name = Path(path).name
        for source in sources:
            if path.endswith(".c") or f'"{name}"' in source.read_text():
                done = subprocess.run(
                    ["cc", "-fsyntax-only", "-march=native", "-std=gnu11", str(source)], capture_output=True
                )
                if done.returncode:
                    return False
        return True

    def run(self, tests: tuple[str, ...], limit: float, *, own_cache: bool) -> tuple[str, str, float]:
        """Run tests until the first failure: (outcome, failing test or reason, seconds).

        The first file goes alone, so that the others need not be read where it finds the fault; slow tests are last.
        """
        spent = 0.0
        fast = "not gpu and not slow"
        for files, marks in ((tests[:1], fast), (tests[1:], fast), (tests, "not gpu and slow")):
            if not files:
                continue
            outcome, reason, seconds = self._run(files, marks, limit, own_cache)
            spent += seconds
            if outcome != SURVIVED:
                break
        return outcome, reason, spent

    def _run(self, tests: tuple[str, ...], marks: str, limit: float, own_cache: bool) -> tuple[str, str, float]:
        start, log = time.time(), self.folder / "pytest.log"
        shutil.rmtree(self.folder / ".hypothesis", ignore_errors=True)
        child = os.fork()
        if child == 0:
            self._tests(tests, marks, log, own_cache)
        status, outcome = None, FOUND
        while status is None:
            done, code = os.waitpid(child, os.WNOHANG)
            if done:
                status = os.waitstatus_to_exitcode(code)
            elif time.time() - start > limit:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return LATE, "", time.time() - start
            else:
                time.sleep(0.05)
        text = log.read_text(errors="replace")
        reason = next(
            (line.split(" - ")[0] for line in text.splitlines() if line.startswith(("FAILED ", "ERROR "))), ""
        )
        if status in (3, 4, BROKEN):
            raise SystemExit(f"the tests did not start:\n{text[-3000:]}")
        if status in (0, 5):  # 5: no test bears such marks
            outcome = SURVIVED
        elif not reason:
            reason = f"exit code {status}" if status > 0 else f"signal {-status}"
        return outcome, reason.replace("FAILED ", ""), time.time() - start

    def _tests(self, tests: tuple[str, ...], marks: str, log: Path, own_cache: bool) -> None:
        os.setpgid(0, 0)
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(self.folder)
        if own_cache:
            os.environ["EFF_CACHE_DIR"] = str(self.folder / "cache")
            os.environ["EFF_KERNELS_CC"] = f"{sys.executable} {HERE / 'cc.py'}"
            os.environ["FAULTS_OBJECTS"] = str(self.folder / "objects")
            os.makedirs(os.environ["FAULTS_OBJECTS"], exist_ok=True)
        sources = [str(p) for p in sorted(self.folder.glob("*/*/src"))]
        sys.path[:0] = sources
        os.environ["PYTHONPATH"] = os.pathsep.join(sources)
        code = BROKEN
        try:
            import pytest

            options = ["-q", "-x", "--timeout=300", "-p", "no:cacheprovider", "--tb=short", "--durations=15"]
            options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins that a library has loaded
            code = int(pytest.main([*options, "-m", marks, *tests]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def nearest_first(root: Path, tests: tuple[str, ...], fault: Planted) -> tuple[str, ...]:
    """The files of tests, those that speak most of the names in the faulty file first: a fault is found sooner."""
    files = [p for t in tests for p in (sorted((root / t).rglob("test_*.py")) if (root / t).is_dir() else [root / t])]
    names = set(re.findall(r"^(?:def|class) (\w+)", fault.text, re.M)) | {Path(fault.path).stem}
    said = {p: sum(p.read_text().count(name) for name in names) for p in files}
    return tuple(str(p.relative_to(root)) for p in sorted(files, key=lambda p: -said[p]))


def load(packages: set[str]) -> None:
    """Import what the tests will need, so that forks need not."""
    names = dict.fromkeys(["torch", "pytest", *(n for p in sorted(packages) for n in LIBRARIES[p])])
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    early = [name for name in sys.modules if name.split(".")[0].startswith("eff_")]
    if early:
        raise SystemExit(f"loaded before the faults: {early}")


def history() -> list[dict]:
    """All records, in order of time."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def records() -> dict[str, dict]:
    """The latest record of each fault, and of each unit without one."""
    return {r["key"]: r for r in history()}


def note(**record: object) -> None:
    """Append a record."""
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print({k: v for k, v in record.items() if k not in ("key", "commit", "package", "path", "seed")}, flush=True)


def run(options: argparse.Namespace, chosen: list[units.Unit]) -> None:
    """Plant and test until the time is used up."""
    started = time.time()
    os.environ.update(ENVIRONMENT)
    load({u.package for u in chosen})
    known = records()
    with tempfile.TemporaryDirectory() as folder:
        tree = Tree(Path(folder), options.at)
        there = {u.label: u for u in units.units(tree.folder)}  # of that commit, whose folders may be others
        for unit in (there[u.label] for u in chosen if u.label in there):
            common = {"package": unit.package, "unit": unit.name, "commit": tree.commit}
            if options.again:
                old = [r for r in known.values() if (r["package"], r["unit"]) == (unit.package, unit.name)]
                wanted = [r for r in old if r["kind"] != "none" and r["outcome"] == options.again]
                left = [f for r in wanted if (f := replanted(tree.folder, unit, r))]
            else:
                faults = sample(tree.folder, unit, options.count, options.seed)
                left = [f for f in faults if f.key not in known]
                if options.fill:
                    left = left[: options.fill - counts().get(unit.label, Counter())["planted"]]
            if not left or time.time() - started > options.seconds:
                continue
            key = f"sound {unit.label}"
            outcome, reason, usual = SURVIVED, "", known.get(key, {}).get("seconds", 30.0)
            if not options.trust and known.get(key, {}).get("commit") != tree.commit:
                outcome, reason, usual = tree.run(unit.tests, 600, own_cache=False)
                note(key=key, kind="none", outcome=outcome, by=reason, seconds=round(usual, 1), **common)
            if outcome != SURVIVED:
                log = (tree.folder / "pytest.log").read_text()
                print(f"{unit.label}: not green without a fault: {reason}\n{log[-3000:]}")
                continue
            if options.durations:
                print((tree.folder / "pytest.log").read_text()[-3000:])
            for fault in left:
                if time.time() - started > options.seconds:
                    return
                sound = (tree.folder / fault.path).read_text()
                tree.write(fault.path, fault.text)
                native = not fault.path.endswith(".py")
                if native and not tree.compiles(fault.path):
                    outcome, reason, seconds = "not C", "", 0.0
                else:
                    tests = nearest_first(tree.folder, unit.tests, fault)
                    outcome, reason, seconds = tree.run(tests, 300 + 3 * usual, own_cache=native)
                tree.write(fault.path, sound)
                found = {"path": fault.path, "line": fault.line, "before": fault.before, "after": fault.after}
                end = {"outcome": outcome, "by": reason, "seconds": round(seconds, 1), "seed": options.seed}
                note(key=fault.key, kind=fault.kind, **found, **end, **common)


def counts() -> dict[str, Counter]:
    """By unit with a fault: planted, found at once, found since tests were mended, and survivors by verdict."""
    verdicts = tomllib.loads(VERDICTS.read_text())
    made = history()
    first = {r["key"]: r["outcome"] for r in reversed(made)}
    table: dict[str, Counter] = {}
    for key, r in {r["key"]: r for r in made}.items():
        if r["kind"] == "none" or r["outcome"] not in (SURVIVED, FOUND):
            continue
        of_unit = table.setdefault(f"{r['package']}/{r['unit']}", Counter())
        of_unit["planted"] += 1
        if r["outcome"] == FOUND:
            of_unit["mended" if first[key] == SURVIVED else FOUND] += 1
        else:
            of_unit[verdicts.get(key, {}).get("verdict", "not judged")] += 1
    packages = list(LIBRARIES)
    return dict(sorted(table.items(), key=lambda item: (packages.index(item[0].split("/")[0]), item[0])))


def report() -> str:
    """A Markdown table of ``counts``, with the sum of each package above its units."""
    names = ("planted", FOUND, "mended", "equivalent", "open", "not judged")
    table = counts()
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " --: |" * len(names)]

    def row(label: str, of: Counter) -> None:
        lines.append(f"| {label} | " + " | ".join(str(of[n]) for n in names) + " |")

    row("**all**", sum(table.values(), Counter()))
    for package in dict.fromkeys(label.split("/")[0] for label in table):
        own = {label: of for label, of in table.items() if label.split("/")[0] == package}
        row(f"**{package}**", sum(own.values(), Counter()))
        for label, of in own.items():
            row(label.split("/")[1], of)
    return "\n".join(lines)


def page() -> str:
    """The page of the docs with the present table in it."""
    before, rest = PAGE.read_text().split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{report()}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wanted", nargs="*", help="units such as quant/fp4, or packages such as quant; default: all")
    parser.add_argument("--count", type=int, default=6, help="faults in the Python of each unit; half as many in its C")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fill", type=int, default=0, help="only units with fewer faults than this on record")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no fault after this time")
    parser.add_argument("--again", choices=(SURVIVED, FOUND), default="", help="plant those again that came out so")
    parser.add_argument("--trust", action="store_true", help="do not run the tests of a unit without a fault first")
    parser.add_argument("--at", default="HEAD", help="commit whose tree is copied")
    parser.add_argument("--durations", action="store_true", help="print the slowest tests of each unit")
    parser.add_argument("--list", action="store_true", help="list the units")
    parser.add_argument("--report", action="store_true", help="print the counts and write them to docs/faults.md")
    options = parser.parse_args()
    every = units.units(ROOT)
    chosen = [u for u in every if not options.wanted or {u.package, u.label} & set(options.wanted)]
    if options.fill:
        planted = counts()
        chosen = [u for u in chosen if planted.get(u.label, Counter())["planted"] < options.fill]
    place = {u.label: sum(other.package == u.package for other in chosen[:i]) for i, u in enumerate(chosen)}
    chosen.sort(key=lambda u: place[u.label])  # packages take turns, so that a run cut short has seen all of them
    if options.list:
        print("\n".join(f"{u.label}: {', '.join(u.tests)}" for u in chosen))
    elif options.report:
        PAGE.write_text(page())
        print(report())
        there = counts()
        print("nothing planted in:", ", ".join(u.label for u in every if u.label not in there) or "none")
    elif not chosen:
        parser.error(f"no unit is called {options.wanted}; --list names them")
    else:
        run(options, chosen)


if __name__ == "__main__":
    main()
