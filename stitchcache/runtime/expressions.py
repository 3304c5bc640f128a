"""Symbolic sizes from an entry: let only arithmetic through, and evaluate it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Mapping
from keyword import iskeyword

from stitchcache.errors import EntryFormatError

_FUNCTIONS = {"max": max, "min": min}
# Far beyond what torch writes. Within them an expression is evaluated in milliseconds.
_LONGEST = 2000
_MOST_POWER = 9


def check_expression(text: str, symbols: Collection[str], where: str) -> str:
    """Let only arithmetic over known symbols through, or raise an EntryFormatError about ``where``."""
    unknown = sorted(names_in(text, where).difference(symbols))
    if unknown:
        raise _refused(text, where, f"names {unknown[0]!r}, which is no symbol here")
    return text


def names_in(text: str, where: str = "an expression") -> set[str]:
    """Symbols that an expression uses; an EntryFormatError that names the field ``where`` if it is none."""
    # Most are one symbol, and parsing each would be a part of every warm start that can be seen.
    if text.isidentifier() and not iskeyword(text) and text not in _FUNCTIONS:
        return {text}
    found = {part.id for part in ast.walk(_parsed(text, where)) if isinstance(part, ast.Name)}
    return found - _FUNCTIONS.keys()


def evaluator(text: str) -> Callable[[Mapping[str, int]], int]:
    """A function from a value for each symbol to the value of an expression; an EntryFormatError for none.

    The function raises one where the expression divides by zero, or uses a symbol without a value.
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
            raise ValueError("it is too long")
        node = ast.parse(text, mode="eval").body
        _check(node)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _refused(text, where, f"is no arithmetic of sizes ({error})") from error
    return node


def _refused(text: str, where: str, reason: str) -> EntryFormatError:
    said = f"{text[:80]!r} {reason}. stitchcache did not write this entry; delete it."
    return EntryFormatError.at("", where, said)


def _check(node: ast.AST) -> None:
    """Raise a ValueError for a node of any other kind than those named here."""
    parts: list[ast.expr] = []
    match node:
        case ast.Constant(value=int()):
            pass
        case ast.Name(id=name) if name not in _FUNCTIONS:
            pass
        case ast.BinOp(left=base, op=ast.Pow(), right=ast.Constant(value=int() as power)):
            # One power of a power after the other would fill the memory.
            if not 0 <= power <= _MOST_POWER or any(isinstance(part, ast.Pow) for part in ast.walk(base)):
                raise ValueError("its numbers could grow too large")
            parts = [base]
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.FloorDiv() | ast.Mod()):
            parts = [node.left, node.right]
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            parts = [node.operand]
        case ast.BoolOp():
            parts = node.values
        case ast.Compare(ops=[ast.Eq() | ast.NotEq() | ast.Lt() | ast.LtE() | ast.Gt() | ast.GtE()]):
            parts = [node.left, *node.comparators]
        case ast.Call(func=ast.Name(id="max" | "min"), args=[_, _, *_], keywords=[]):
            parts = node.args
        case _:
            raise ValueError(f"it holds {type(node).__name__}")
    for part in parts:
        _check(part)
