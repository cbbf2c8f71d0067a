"""Small changes of a module's code, each of which some test should notice."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.operators.provider import OperatorProvider

# One or two replacements for each operator: Cosmic Ray has all pairs, of which most fail at once.
REPLACED = {
    "BinaryOperator": "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_Mul Pow_Mul BitOr_BitAnd "
    "BitAnd_BitOr LShift_RShift RShift_LShift",
    "ComparisonOperator": "Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt "
    "GtE_Lt Is_IsNot IsNot_Is",
    "UnaryOperator": "Delete_USub Delete_Invert Delete_Not",
}
OTHERS = (
    "AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd "
    "ReplaceBreakWithContinue ReplaceContinueWithBreak NumberReplacer RemoveDecorator "
    "ZeroIterationForLoop"
)
MESSAGES = {"refuse", "require_extra"}  # what they are given is what a person reads

Span = tuple[tuple[int, int], tuple[int, int]]


class RemoveCall(Operator):
    """Replaces a statement that is nothing but a call by `pass`."""

    def mutation_positions(self, node: Any) -> Iterator[Span]:
        if _is_call(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        nothing = parso.parse("pass\n").children[0]
        nothing.get_first_leaf().prefix = node.get_first_leaf().prefix
        return nothing

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


def _is_call(node: Any) -> bool:
    if node.type != "simple_stmt" or node.children[0].type not in ("atom_expr", "power"):
        return False
    last = node.children[0].children[-1]
    return last.type == "trailer" and last.children[0].value == "("


@dataclass(frozen=True)
class Mutant:
    """The `occurrence`-th change that `operator` makes in `module`, at `line`."""

    module: str
    operator: str
    occurrence: int
    line: int

    def code(self, before: str) -> str:
        changed = mutate_code(before, operators()[self.operator], self.occurrence)
        assert changed is not None, self
        return changed


def operators() -> dict[str, Operator]:
    provider = OperatorProvider()
    names = [f"Replace{kind}_{pair}" for kind, pairs in REPLACED.items() for pair in pairs.split()]
    names += OTHERS.split()
    return {name: provider[name]() for name in names} | {"RemoveCall": RemoveCall()}


def mutants(root: Path, module: str) -> list[Mutant]:
    """All mutants of a module, in the order of its lines."""
    code = (root / module).read_text()
    skipped = list(_no_behaviour(ast.parse(code)))
    nodes = list(ast_nodes(get_ast(code)))
    found = []
    for name, operator in operators().items():
        found_by_it = [(node, span) for node in nodes for span in operator.mutation_positions(node)]
        for occurrence, (node, (start, end)) in enumerate(found_by_it):
            if any(first <= start and end <= last for first, last in skipped):
                continue
            if node.type == "operator" and node.parent.type == "parameters":
                continue  # the star of keyword-only arguments
            found.append(Mutant(module, name, occurrence, start[0]))
    return sorted(found, key=lambda mutant: (mutant.line, mutant.operator, mutant.occurrence))


def difference(code: str, changed: str) -> tuple[str, str]:
    """What of the code is other than before, with the rest of its lines."""
    before, after = code.splitlines(), changed.splitlines()
    while before and after and before[-1] == after[-1]:
        before.pop(), after.pop()
    while before and after and before[0] == after[0]:
        before.pop(0), after.pop(0)
    joined = [re.sub(r"\s+", " ", " ".join(lines)).strip() for lines in (before, after)]
    return joined[0], joined[1]


def _no_behaviour(tree: ast.Module) -> Iterator[Span]:
    """Annotations and messages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign):
            yield _span(node.annotation)
        elif isinstance(node, ast.arg) and node.annotation is not None:
            yield _span(node.annotation)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.returns is not None:
            yield _span(node.returns)
        elif isinstance(node, ast.JoinedStr):
            yield _span(node)
        elif isinstance(node, ast.Call) and _name(node.func) in MESSAGES:
            yield from map(_span, node.args)
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from map(_span, node.exc.args)
        elif isinstance(node, ast.If) and _name(node.test) == "TYPE_CHECKING":
            yield _span(node)


def _span(node: ast.expr | ast.stmt) -> Span:
    assert node.end_lineno is not None and node.end_col_offset is not None
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
