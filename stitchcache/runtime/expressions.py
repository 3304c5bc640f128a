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
_FUNCTIONS = {"max": max, "min": min}
WORDS = frozenset({"distinct", "plain", "apart"})
"""Constraints of a contract that are no expressions; ``InputSpec`` says what they mean."""
# Far beyond what torch writes. Parsing, checking and evaluating within them takes no time worth a word.
_LONGEST = 4000
_DEEPEST = 200
_MOST_BITS = 1000
_SIZE_BITS = 64


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
    # Most are one symbol, and parsing each would be a part of every warm start that can be seen.
    if text not in symbols:
        unknown = sorted(_names(_parsed(text, where)) - set(symbols))
        if unknown:
            raise _refused(text, where, f"names {unknown[0]!r}, which is no symbol here")
    return text


def names_in(text: str) -> set[str]:
    """Symbols that an expression uses.

    Raises:
        EntryFormatError: It is none.
    """
    if text.isidentifier() and not iskeyword(text):
        return {text} - _FUNCTIONS.keys()
    return _names(_parsed(text, "an expression"))


def evaluate(text: str, values: Mapping[str, int]) -> int:
    """Evaluate an expression.

    Args:
        text: An expression.
        values: A value for each of its symbols.

    Raises:
        EntryFormatError: It is none, divides by zero, or uses a symbol without a value.
    """
    if text in values:
        return int(values[text])
    node = _parsed(text, "an expression")
    try:
        return int(_evaluate(node, values))
    except (ArithmeticError, KeyError) as error:
        reason = (
            "divides by zero" if isinstance(error, ArithmeticError) else f"names {error}, which has no value"
        )
        raise _refused(text, "an expression", reason) from error


def _parsed(text: str, where: str) -> ast.expr:
    """An expression's tree. Nothing is in it but what :func:`evaluate` knows, and no number grows large."""
    try:
        if len(text) > _LONGEST:
            raise ValueError("is too long")
        node = ast.parse(text, mode="eval").body
        _bits(node, 0)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        is_ours = type(error) is ValueError and not str(error).startswith("source code")
        raise _refused(text, where, str(error) if is_ours else f"is not an expression ({error})") from error
    return node


def _refused(text: str, where: str, reason: str) -> EntryFormatError:
    return EntryFormatError(
        f"{where}: {text[:80]!r} {reason}. stitchcache did not write this entry; delete it.",
        field=where,
        reason=reason,
    )


def _bits(node: ast.AST, depth: int) -> int:
    """At most how many bits the value of a node has.

    Before anything is evaluated: one power of a power fills the memory.

    Raises:
        ValueError: A node is of no kind that is let through, or too many bits.
    """
    if depth > _DEEPEST:
        raise ValueError("is nested too deeply")
    if isinstance(node, ast.Name):
        if node.id in _FUNCTIONS:
            raise ValueError(f"names {node.id!r} and does not call it")
        return _SIZE_BITS
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        bits = node.value.bit_length()
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _bits(node.left, depth + 1), _bits(node.right, depth + 1)
        bits = max(left, right) + 1
        if isinstance(node.op, ast.Mult):
            bits = left + right
        elif isinstance(node.op, ast.Pow):
            if not isinstance(node.right, ast.Constant) or not isinstance(node.right.value, int):
                raise ValueError("has a variable exponent")
            bits = left * node.right.value
    else:
        bits = max((_bits(part, depth + 1) for part in _parts(node)), default=1)
    if bits > _MOST_BITS:
        raise ValueError("builds numbers that are too large")
    return bits


def _parts(node: ast.AST) -> list[ast.expr]:
    """What the other kinds of nodes are made of."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        return [node.operand]
    if isinstance(node, ast.BoolOp):
        return node.values
    if isinstance(node, ast.Compare):
        if len(node.ops) != 1 or type(node.ops[0]) not in _BINARY:
            raise ValueError("holds a comparison that is none of sizes")
        return [node.left, *node.comparators]
    if isinstance(node, ast.Call):
        if (
            not isinstance(node.func, ast.Name)
            or node.func.id not in _FUNCTIONS
            or not node.args
            or node.keywords
        ):
            raise ValueError("calls something other than max and min")
        return node.args
    raise ValueError(f"holds {type(node).__name__}")


def _names(node: ast.expr) -> set[str]:
    found = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return found - _FUNCTIONS.keys()


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
    raise TypeError(f"{type(node).__name__} was let through")
