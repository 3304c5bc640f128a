"""Symbolic sizes from an entry: let only arithmetic through, and evaluate it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Mapping
from keyword import iskeyword

from stitchcache.errors import EntryFormatError

_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Pow)
_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_FUNCTIONS = {"max": max, "min": min}
# Far beyond what torch writes. Parsing, checking and evaluating within them takes no time worth a word.
_LONGEST = 4000
_DEEPEST = 200
_MOST_BITS = 1000
_SIZE_BITS = 64


def check_expression(text: str, symbols: Collection[str], where: str) -> str:
    """Let only arithmetic over known symbols through; ``where`` is the field that an error names.

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


def evaluator(text: str) -> Callable[[Mapping[str, int]], int]:
    """A function from a value for each symbol to the value of an expression.

    It raises EntryFormatError where the expression divides by zero, or uses a symbol without a value.

    Raises:
        EntryFormatError: It is no expression.
    """
    code = compile(ast.Expression(_parsed(text, "an expression")), "<size>", "eval")

    def evaluate(values: Mapping[str, int]) -> int:
        try:
            return int(eval(code, {"__builtins__": {}, **_FUNCTIONS}, dict(values)))
        except (ArithmeticError, NameError) as error:
            raise _refused(text, "an expression", str(error)) from error

    return evaluate


def _parsed(text: str, where: str) -> ast.expr:
    """An expression's tree. Nothing but arithmetic is in it, and no number grows large."""
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
    """At most how many bits the value of a node has, before one power of a power fills the memory.

    Raises:
        ValueError: A node is of no kind that is let through, or has too many bits.
    """
    if depth > _DEEPEST:
        raise ValueError("is nested too deeply")
    if isinstance(node, ast.Name):
        if node.id in _FUNCTIONS:
            raise ValueError(f"names {node.id!r} and does not call it")
        return _SIZE_BITS
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        bits = node.value.bit_length()
    elif isinstance(node, ast.BinOp) and isinstance(node.op, _ARITHMETIC):
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
        if len(node.ops) != 1 or not isinstance(node.ops[0], _COMPARISONS):
            raise ValueError("holds a comparison that is none of sizes")
        return [node.left, *node.comparators]
    if isinstance(node, ast.Call):
        named = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
        if not named or not node.args or node.keywords:
            raise ValueError("calls something other than max and min")
        return node.args
    raise ValueError(f"holds {type(node).__name__}")


def _names(node: ast.expr) -> set[str]:
    found = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return found - _FUNCTIONS.keys()
