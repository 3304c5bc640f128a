"""Mutants of source: one literal, operator, call, keyword, comparison or statement changed in each."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator

_SWAPPED: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Add,
    ast.USub: ast.UAdd,
    ast.Not: ast.UAdd,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


def _literal(node: ast.Constant) -> ast.AST | None:
    value = node.value
    if isinstance(value, bool):
        return ast.Constant(not value)
    if isinstance(value, (int, float)):
        return ast.Constant(value + 1)
    if isinstance(value, str):
        return ast.Constant(value + "x")
    return ast.Constant(0) if value is None else None


def _call(node: ast.Call) -> ast.AST | None:
    """A call becomes its first argument; a method's call becomes the object."""
    if node.args and not isinstance(node.args[0], ast.Starred):
        return node.args[0]
    return node.func.value if isinstance(node.func, ast.Attribute) else None


def _without_keyword(node: ast.Call) -> ast.AST | None:
    if not node.keywords:
        return None
    return ast.Call(node.func, node.args, node.keywords[1:])


def _swapped_operator(node: ast.AST) -> ast.AST | None:
    made = copy.copy(node)
    if isinstance(made, ast.Compare):
        found = _SWAPPED.get(type(made.ops[0]))
        if found is None:
            return None
        made.ops = [found(), *made.ops[1:]]
        return made
    found = _SWAPPED.get(type(made.op))  # type: ignore[attr-defined]
    if found is None:
        return None
    made.op = found()  # type: ignore[attr-defined]
    return made


def _dropped(node: ast.stmt) -> ast.AST:
    return ast.copy_location(ast.Pass(), node)


_RULES: list[tuple[str, tuple[type, ...], Callable[..., ast.AST | None]]] = [
    ("literal", (ast.Constant,), _literal),
    ("operator", (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.AugAssign), _swapped_operator),
    ("call", (ast.Call,), _call),
    ("keyword", (ast.Call,), _without_keyword),
    ("statement", (ast.Assign, ast.AugAssign, ast.Expr, ast.If, ast.Return, ast.For), _dropped),
]


class _Change(ast.NodeTransformer):
    def __init__(self, wanted: ast.AST, new: ast.AST) -> None:
        self.wanted, self.new = wanted, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.wanted else self.generic_visit(node)


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """Every mutant of a source text: what was changed and where, and the new text."""
    tree = ast.parse(source)
    sites = [
        (kind, index, node)
        for kind, types, _ in _RULES
        for index, node in enumerate(ast.walk(tree))
        if isinstance(node, types)
    ]
    change = {kind: rule for kind, _, rule in _RULES}
    for kind, index, _ in sites:
        fresh = ast.parse(source)
        node = next(n for i, n in enumerate(ast.walk(fresh)) if i == index)
        new = change[kind](node)
        if new is None or (isinstance(node, ast.Constant) and _is_text(fresh, node)):
            continue
        text = ast.unparse(ast.fix_missing_locations(_Change(node, new).visit(fresh)))
        yield f"{kind} in line {getattr(node, 'lineno', 0)}", text


def _is_text(tree: ast.Module, node: ast.AST) -> bool:
    """Whether a constant is a docstring or part of an f-string, where a change is none or no source."""
    return any(
        (isinstance(above, ast.Expr) and above.value is node)
        or (isinstance(above, ast.JoinedStr) and node in above.values)
        for above in ast.walk(tree)
    )
