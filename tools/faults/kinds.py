"""Faults that a person could write, found in a source file: each is one replacement in the text.

Python is read as a tree, so that a fault hits code and neither docstrings nor messages; C by its tokens.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is not": "is", "is": "is not"}
COMPARISONS |= {"not in": "in", "in": "not in"}
OPERATORS = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*")}
OPERATORS |= {ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "//"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&")}
COPIES = ("clone", "contiguous", "float", "double", "detach", "to", "abs", "clamp", "flip", "copy", "eval")
SWAPPED = ("matmul", "dot", "einsum", "where", "copy_", "baddbmm", "addmm", "minimum", "maximum", "sub", "div")


LOUD = ("condition", "logic", "flag")  # kinds that mostly end in an error; the others in silent wrong numbers


@dataclass(frozen=True)
class Fault:
    """A replacement: ``text[start:end]`` becomes ``new``."""

    kind: str
    start: int
    end: int
    new: str


def apply(text: str, fault: Fault) -> str:
    """The text with the fault in it."""
    return text[: fault.start] + fault.new + text[fault.end :]


def line_of(text: str, fault: Fault) -> int:
    """The line, counted from 1, on which a fault begins."""
    return text.count("\n", 0, fault.start) + 1


def balanced_sample(found: Sequence[tuple[str, Fault]], count: int, seed: str) -> list[tuple[str, Fault]]:
    """A sample of (file, fault) in which kinds take turns, those of silent wrong numbers first; the same for a seed."""
    draw = random.Random(seed)
    by_kind: dict[str, list[tuple[str, Fault]]] = {}
    for item in found:
        by_kind.setdefault(item[1].kind, []).append(item)
    chosen: list[tuple[str, Fault]] = []
    while by_kind and len(chosen) < count:
        for kind in sorted(draw.sample(sorted(by_kind), len(by_kind)), key=lambda kind: kind in LOUD):
            items = by_kind[kind]
            chosen.append(items.pop(draw.randrange(len(items))))
            if not items:
                del by_kind[kind]
    return chosen[:count]


def in_python(text: str) -> list[Fault]:
    """All faults that this module knows for a Python file."""
    return list(_Finder(text).find())


class _Finder:
    def __init__(self, text: str) -> None:
        self.text, self.tree = text, ast.parse(text)
        starts = [0]
        for line in text.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        self.starts = starts

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        end = self.starts[(node.end_lineno or 1) - 1] + (node.end_col_offset or 0)
        return self.starts[node.lineno - 1] + node.col_offset, end  # sources are ASCII: bytes are characters

    def source(self, node: ast.expr | ast.stmt) -> str:
        start, end = self.span(node)
        return self.text[start:end]

    def find(self) -> Iterator[Fault]:
        for function in ast.walk(self.tree):
            if isinstance(function, (ast.FunctionDef, ast.Lambda)):
                body = function.body if isinstance(function.body, list) else [function.body]
                if isinstance(function, ast.FunctionDef) and function.name in ("__repr__", "__str__"):
                    continue
                for node in body:
                    yield from self.visit(node)

    def visit(self, node: ast.AST) -> Iterator[Fault]:
        # Messages are no behaviour worth a test each; inner functions are reached by themselves.
        if isinstance(node, (ast.Raise, ast.FunctionDef, ast.Lambda, ast.Import, ast.ImportFrom, ast.JoinedStr)):
            return
        yield from self.here(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self.visit(child)

    def here(self, node: ast.AST) -> Iterator[Fault]:
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield from self.between(node.left, node.comparators[0], COMPARISONS, "comparison")
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            old, new = OPERATORS[type(node.op)]
            yield from self.between(node.left, node.right, {old: new}, "arithmetic")
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            start, end = self.span(node)
            yield Fault("operands", start, end, f"{self.source(node.right)} @ {self.source(node.left)}")
        elif isinstance(node, ast.Constant):
            yield from self.constant(node)
        elif isinstance(node, ast.BoolOp):
            old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            yield from self.between(node.values[0], node.values[1], {old: new}, "logic")
        elif isinstance(node, (ast.If, ast.IfExp)) and not _names(node.test, "TYPE_CHECKING"):
            start, end = self.span(node.test)
            yield Fault("condition", start, end, f"(not ({self.source(node.test)}))")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            start, end = self.span(node)
            if not isinstance(node.operand, ast.Constant):
                yield Fault("sign", start, end, self.source(node.operand))
        elif (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)) or isinstance(node, ast.AugAssign):
            yield Fault("dropped statement", *self.span(node), "pass")
        elif isinstance(node, ast.Call):
            yield from self.call(node)

    def between(self, left: ast.expr, right: ast.expr, table: dict[str, str], kind: str) -> Iterator[Fault]:
        start, end = self.span(left)[1], self.span(right)[0]
        gap = self.text[start:end]
        for old in sorted(table, key=len, reverse=True):
            word = rf"(?<![\w]){old}(?![\w])" if old[0].isalpha() else re.escape(old)
            if at := re.search(word, gap):
                yield Fault(kind, start + at.start(), start + at.end(), table[old])
                return

    def constant(self, node: ast.Constant) -> Iterator[Fault]:
        start, end = self.span(node)
        value = node.value
        if isinstance(value, bool):
            yield Fault("flag", start, end, str(not value))
        elif isinstance(value, int):
            yield Fault("constant", start, end, str(value + 1))
        elif isinstance(value, float):
            yield Fault("constant", start, end, repr(value * 1.5 if value else 0.5))

    def call(self, node: ast.Call) -> Iterator[Fault]:
        start, end = self.span(node)
        if isinstance(node.func, ast.Attribute):
            device = node.func.attr == "to" and "device" in self.source(node)  # tests run on one device
            if node.func.attr in COPIES and not device and not _names(node.func.value, "torch"):
                yield Fault(f"missing {node.func.attr}", start, end, self.source(node.func.value))
            if node.func.attr in SWAPPED and len(node.args) >= 2:
                first, second = node.args[-2:]
                if not any(isinstance(a, ast.Starred) for a in (first, second)):
                    a, b = self.span(first)[0], self.span(second)[1]
                    yield Fault("operands", a, b, f"{self.source(second)}, {self.source(first)}")
        for keyword in node.keywords:
            if keyword.arg in ("dim", "keepdim", "scale", "dtype", "causal", "mask", "attention_mask"):
                a, b = self.starts[keyword.lineno - 1] + keyword.col_offset, self.span(keyword.value)[1]
                if gap := re.match(r",?\s*", self.text[b:]):
                    yield Fault(f"no {keyword.arg}", a, b + gap.end(), "")


def _names(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


C_SKIP = re.compile(
    r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"|^\s*#[^\n]*(?:\\\n[^\n]*)*|_Static_assert[^;]*;", re.S | re.M
)
C_TOKENS = (
    ("comparison", r"(?<=[\w\])] )(<=|>=|<|>|==|!=)(?= [\w(\-])"),
    ("arithmetic", r"(?<=[\w\])] )([+\-*/%&|])(?= [\w(])"),
    ("constant", r"(?<![\w.\"])(\d+)(?![\w.])"),
    ("logic", r"(&&|\|\|)"),
    ("dropped statement", r"(?<=\n)[ \t]+([\w\[\].>\-]+(?:\[[^;\n]*\])? [+\-*/|]?= [^;\n]+;)(?=\n)"),
    ("condition", r"\bif \(([^()\n]+)\)"),
)
C_NEW = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "&&": "||", "||": "&&"}
C_NEW |= {"+": "-", "-": "+", "*": "/", "/": "*", "%": "/", "&": "|", "|": "&"}


def in_c(text: str) -> list[Fault]:
    """All faults that this module knows for a C file; those that do not compile are for the caller to leave out."""
    blank = C_SKIP.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    found = []
    for kind, pattern in C_TOKENS:
        for m in re.finditer(pattern, blank):
            old = m[1]
            if kind == "constant":
                new = str(int(old) + 1)
            elif kind == "condition":
                new = f"!({old})"
            elif kind == "dropped statement":
                new = ";"
            else:
                new = C_NEW[old]
            found.append(Fault(kind, m.start(1), m.end(1), new))
    return found
