"""Symbolic sizes from an entry: let only arithmetic through, and evaluate it."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Collection, Mapping
from keyword import iskeyword
from typing import Any

from stitchcache.errors import EntryFormatError

_BINARY: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ALLOWED = (
    ast.Expression,
    ast.BinOp,
    ast.UnaryOp,
    ast.USub,
    ast.Not,
    ast.BoolOp,
    ast.And,
    ast.Or,
    ast.Compare,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.Call,
    *_BINARY,
)
_FUNCTIONS = {"max": max, "min": min}
_LONGEST = 4000


def check_expression(text: str, symbols: Collection[str], where: str) -> str:
    """Let only arithmetic over known symbols through.

    Args:
        text: An expression from an entry.
        symbols: Names that it may use.
        where: The field it stands in, for the error.

    Returns:
        The expression.

    Raises:
        EntryFormatError: It is anything else.
    """
    if text in symbols:
        # Most are one symbol, and parsing each would be a part of every warm start that can be seen.
        return text
    reason = "is too long" if len(text) > _LONGEST else ""
    try:
        nodes = [] if reason else list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        nodes, reason = [], f"is not an expression ({error})"
    for node in nodes:
        reason = reason or _objection(node, symbols)
    if reason:
        raise EntryFormatError(
            f"{where}: {text[:80]!r} {reason}. stitchcache did not write this entry; delete it.",
            field=where,
            reason=reason,
        )
    return text


def _objection(node: ast.AST, symbols: Collection[str]) -> str:
    if not isinstance(node, _ALLOWED):
        return f"holds {type(node).__name__}"
    if isinstance(node, ast.Name) and node.id not in symbols and node.id not in _FUNCTIONS:
        return f"names {node.id!r}, which is no symbol here"
    if isinstance(node, ast.Constant) and type(node.value) not in (int, bool):
        return f"holds the constant {node.value!r}"
    if isinstance(node, ast.Compare) and len(node.ops) != 1:
        return "chains comparisons"
    if isinstance(node, ast.Call) and not (
        isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and node.args and not node.keywords
    ):
        return "calls something other than max and min"
    if (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Pow)
        and not isinstance(node.right, ast.Constant)
    ):
        return "has a variable exponent"
    return ""


def names_in(text: str) -> set[str]:
    """Symbols that a checked expression uses."""
    if text.isidentifier() and not iskeyword(text):
        return {text} - _FUNCTIONS.keys()
    found = {node.id for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Name)}
    return found - _FUNCTIONS.keys()


def evaluate(text: str, values: Mapping[str, int]) -> int:
    """Evaluate a checked expression.

    Args:
        text: An expression that passed :func:`check_expression`.
        values: A value for each of its symbols.

    Raises:
        KeyError: A symbol has no value.
    """
    if text in values:
        return int(values[text])
    return int(_evaluate(ast.parse(text, mode="eval").body, values))


def _evaluate(node: ast.expr, values: Mapping[str, int]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.BinOp):
        return _BINARY[type(node.op)](_evaluate(node.left, values), _evaluate(node.right, values))
    if isinstance(node, ast.UnaryOp):
        operand = _evaluate(node.operand, values)
        return (not operand) if isinstance(node.op, ast.Not) else -operand
    if isinstance(node, ast.BoolOp):
        parts = [_evaluate(part, values) for part in node.values]
        return all(parts) if isinstance(node.op, ast.And) else any(parts)
    if isinstance(node, ast.Compare):
        left, right = _evaluate(node.left, values), _evaluate(node.comparators[0], values)
        return _BINARY[type(node.ops[0])](left, right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _FUNCTIONS[node.func.id](_evaluate(argument, values) for argument in node.args)
    raise EntryFormatError(f"an expression holds {type(node).__name__}.", field="input_spec")
