"""Text to measure language models on: documentation of installed packages, whose versions uv.lock pins.

README files come from package metadata, docstrings from the sources (they are parsed, nothing is imported).
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from importlib.metadata import distribution

READMES = ("transformers", "accelerate", "peft", "torchao", "huggingface_hub", "torch", "regex", "tqdm", "sympy")
DOCSTRINGS = (
    ("torch", "torch/nn/modules/loss.py"),
    ("torch", "torch/optim/lr_scheduler.py"),
    ("torch", "torch/distributed/fsdp/fully_sharded_data_parallel.py"),
    ("numpy", "numpy/lib/_function_base_impl.py"),
    ("numpy", "numpy/linalg/_linalg.py"),
    ("networkx", "networkx/classes/graph.py"),
    ("sympy", "sympy/solvers/ode/ode.py"),
    ("sympy", "sympy/logic/boolalg.py"),
    ("hypothesis", "hypothesis/strategies/_internal/core.py"),
    ("matplotlib", "matplotlib/axes/_axes.py"),
    ("transformers", "transformers/generation/configuration_utils.py"),
    ("peft", "peft/tuners/lora/config.py"),
    ("accelerate", "accelerate/accelerator.py"),
    ("huggingface_hub", "huggingface_hub/hf_api.py"),
)
CALIBRATION = (("mpmath", "mpmath/calculus/quadrature.py"), ("networkx", "networkx/algorithms/community/louvain.py"))

LIMIT = 20_000  # characters of one source, so that no source outweighs the others
SHORTEST = 400  # a docstring below this says little that could be predicted from it


@dataclass(frozen=True, slots=True)
class Source:
    """Where a text comes from, and the text."""

    name: str
    text: str


def scored() -> list[Source]:
    """All texts that count."""
    readmes = [Source(f"README of {named(p)}", distribution(p).metadata.get_payload()[:LIMIT]) for p in READMES]
    return readmes + [docstrings(*where) for where in DOCSTRINGS]


def calibration() -> list[Source]:
    """Texts to find outlier columns on; none of them counts."""
    return [docstrings(*where) for where in CALIBRATION]


def docstrings(package: str, path: str) -> Source:
    """The longer docstrings of a source file, one after the other."""
    tree = ast.parse(distribution(package).locate_file(path).read_text(encoding="utf-8"))
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    found = [text for n in nodes if len(text := ast.get_docstring(n) or "") >= SHORTEST]
    return Source(f"docstrings of {named(package)}: {path}", "\n\n".join(found)[:LIMIT])


def named(package: str) -> str:
    """Name and version."""
    return f"{package} {distribution(package).version}"
