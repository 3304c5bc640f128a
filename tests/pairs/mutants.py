"""Mutants of source: one literal, operator, call, keyword, comparison or statement changed in each."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from functools import partial

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


def _literal(node: ast.Constant) -> Iterator[ast.AST]:
    value = node.value
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, (int, float)):
        yield ast.Constant(value + 1)
        yield ast.Constant(value - 1)
        if value:
            yield ast.Constant(-value)
    elif isinstance(value, str):
        yield ast.Constant(value + "x")
    elif value is None:
        yield ast.Constant(0)


def _call(node: ast.Call) -> Iterator[ast.AST]:
    """A call becomes its first argument; a method's call becomes the object; arguments trade places."""
    plain = [item for item in node.args if not isinstance(item, ast.Starred)]
    if plain and plain[0] is node.args[0]:
        yield node.args[0]
    if isinstance(node.func, ast.Attribute):
        yield node.func.value
    if len(plain) > 1 and len(plain) == len(node.args):
        yield ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)


def _without_keyword(node: ast.Call) -> Iterator[ast.AST]:
    for index in range(len(node.keywords)):
        yield ast.Call(node.func, node.args, node.keywords[:index] + node.keywords[index + 1 :])


def _swapped_operator(node: ast.AST) -> Iterator[ast.AST]:
    made = copy.copy(node)
    old = made.ops[0] if isinstance(made, ast.Compare) else made.op  # type: ignore[attr-defined]
    found = _SWAPPED.get(type(old))
    if found is not None and isinstance(made, ast.Compare):
        made.ops = [found(), *made.ops[1:]]
        yield made
    elif found is not None:
        made.op = found()  # type: ignore[attr-defined]
        yield made
    if isinstance(node, ast.BinOp):
        yield node.left
        yield node.right


def _dropped(node: ast.stmt) -> Iterator[ast.AST]:
    yield ast.copy_location(ast.Pass(), node)
    if isinstance(node, ast.If):
        yield ast.copy_location(ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse), node)


_RULES: list[tuple[str, tuple[type, ...], Callable[..., Iterator[ast.AST]]]] = [
    ("literal", (ast.Constant,), _literal),
    ("operator", (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.AugAssign), _swapped_operator),
    ("call", (ast.Call,), _call),
    ("keyword", (ast.Call,), _without_keyword),
    ("statement", (ast.Assign, ast.AugAssign, ast.Expr, ast.If, ast.Return, ast.For), _dropped),
]


def mutants(source: str) -> list[tuple[str, Callable[[], str]]]:
    """Every mutant of a source text: what is changed and where, and a function that makes the new text."""
    tree = ast.parse(source)
    above = {id(below): node for node in ast.walk(tree) for below in ast.iter_child_nodes(node)}
    found: list[tuple[str, Callable[[], str]]] = []
    for kind, types, change in _RULES:
        for node in [node for node in ast.walk(tree) if isinstance(node, types)]:
            if isinstance(node, ast.Constant) and _is_text(tree, node):
                continue
            name = f"{kind} in line {getattr(node, 'lineno', 0)}"
            found += ((name, partial(_changed, tree, above[id(node)], node, new)) for new in change(node))
    return found


def _changed(tree: ast.Module, above: ast.AST, node: ast.AST, new: ast.AST) -> str:
    """The text of a tree with one node replaced; the tree stays as it is."""
    for field, value in ast.iter_fields(above):
        if value is node or (isinstance(value, list) and any(item is node for item in value)):
            put = new if value is node else [new if item is node else item for item in value]
            setattr(above, field, put)
            try:
                return ast.unparse(ast.fix_missing_locations(tree))
            finally:
                setattr(above, field, value)
    raise ValueError(node)


def _is_text(tree: ast.Module, node: ast.AST) -> bool:
    """Whether a constant is a docstring or part of an f-string, where a change is none or no source."""
    return any(
        (isinstance(above, ast.Expr) and above.value is node)
        or (isinstance(above, ast.JoinedStr) and node in above.values)
        for above in ast.walk(tree)
    )
