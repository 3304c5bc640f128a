"""Symbolic sizes: read them off fake tensors and write them with canonical names.

torch names symbols by where they came from (``s77``). Here they are ``s0``, ``s1``, ... in order of first
appearance, and an expression is rebuilt over these names before it is printed: sympy orders terms by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import permutations
from typing import Any

import sympy
import torch

from stitchcache.errors import SplitError
from stitchcache.torchside import ops
from stitchcache.torchside.ops import SYMBOLIC as SYMBOLIC, example_of as example_of, expression as expression

# Expressions with more new symbols than this are rare, and a bad order can only cost a miss.
_MOST_NEW = 4
# How our call checks write what sympy has classes for.
_JOINTS: dict[type, str] = {
    sympy.Add: " + ", sympy.Mul: " * ", ops.FloorDiv: " // ", ops.CleanDiv: " // ", ops.Mod: " % ",
    ops.PythonMod: " % ", sympy.Mod: " % ", sympy.And: " and ", sympy.Or: " or ", sympy.Eq: " == ",
    sympy.Ne: " != ", sympy.Ge: " >= ", sympy.Gt: " > ", sympy.Le: " <= ", sympy.Lt: " < ",
}  # fmt: skip


def solve(pairs: Iterable[tuple[Any, Any]]) -> dict[sympy.Symbol, int]:
    """Values of the symbols that stand alone as a size, from fake tensors or sizes and the real ones."""
    found: dict[sympy.Symbol, int] = {}
    for fake, real in pairs:
        sizes: Iterable[tuple[Any, int]] = ()
        if isinstance(fake, torch.Tensor) and isinstance(real, torch.Tensor):
            sizes = zip(fake.shape, real.shape, strict=True)
        elif isinstance(fake, torch.SymInt) and isinstance(real, int):
            sizes = [(fake, real)]
        for size, actual in sizes:
            expr = expression(size)
            if expr.is_Symbol:
                found.setdefault(expr, int(actual))
    return found


def evaluate(size: Any, values: Mapping[sympy.Symbol, Any]) -> int | None:
    """A size for given values of its symbols; ``None`` if they do not decide it, or below 0."""
    expr = expression(size).xreplace({symbol: sympy.Integer(value) for symbol, value in values.items()})
    return int(expr) if expr.is_Integer and int(expr) >= 0 else None


def shape_environment(graph: torch.fx.Graph) -> Any | None:
    """The ``ShapeEnv`` that a graph's symbolic sizes live in; ``None`` if all sizes are static."""
    for node in graph.nodes:
        value = value_of(node)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            sizes = (*item.shape, *stride_of(item)) if isinstance(item, torch.Tensor) else (item,)
            for size in sizes:
                if isinstance(size, SYMBOLIC):
                    return ops.environment_of(size)
    return None


def value_of(node: torch.fx.Node) -> Any:
    """The fake value of a node, under either of the names that torch gives it."""
    return node.meta.get("val", node.meta.get("example_value"))


def stride_of(value: torch.Tensor) -> tuple[Any, ...]:
    """Strides of a tensor; empty for layouts that have none."""
    return tuple(value.stride()) if value.layout == torch.strided else ()


def without_guards(graph: torch.fx.Graph) -> AbstractContextManager[None]:
    """Let nobody add assumptions about a graph's sizes: the process that only loads would not make them."""
    return ops.without_guards(shape_environment(graph))


def structure(expr: sympy.Basic) -> str:
    """Write an expression node by node: unlike its printed form, without loss."""
    if not expr.args:
        return f"{type(expr).__name__}:{expr}"
    return f"{type(expr).__name__}({','.join(structure(arg) for arg in expr.args)})"


class SymbolNames:
    """Canonical names for symbols, given out in order of first appearance."""

    def __init__(self) -> None:
        self._canonical: dict[sympy.Symbol, sympy.Symbol] = {}

    def __contains__(self, symbol: sympy.Symbol) -> bool:
        return symbol in self._canonical

    def items(self) -> Iterator[tuple[sympy.Symbol, str]]:
        """Pairs of torch's symbol and our name, in order."""
        return ((symbol, str(ours)) for symbol, ours in self._canonical.items())

    def rename(self, expr: sympy.Basic) -> sympy.Basic:
        """Rebuild an expression over canonical names.

        New symbols of one expression are named so that its text becomes the smallest, which does not
        depend on torch's names for them.
        """
        new = sorted(expr.free_symbols - self._canonical.keys(), key=str)
        if len(new) > 1:
            orders = permutations(new) if len(new) <= _MOST_NEW else [tuple(new)]
            new = list(min(orders, key=lambda order: structure(expr.xreplace(self._with(order)))))
        self._canonical = self._with(new)
        return expr.xreplace(self._canonical)

    def _with(self, new: Iterable[sympy.Symbol]) -> dict[sympy.Symbol, sympy.Symbol]:
        names = dict(self._canonical)
        for symbol in new:
            # With the same assumptions: weaker or stronger ones would simplify differently.
            facts = ("integer", "real", "positive", "nonnegative")
            assumed = {fact: True for fact in facts if getattr(symbol, f"is_{fact}")}
            names[symbol] = sympy.Symbol(f"s{len(names)}", **assumed)
        return names

    def size(self, value: int | torch.SymInt) -> int | str:
        """A size as records keep it: an int, or an expression as text."""
        if not isinstance(value, SYMBOLIC):
            return int(value)
        expr = self.rename(expression(value))
        return int(expr) if expr.is_Integer else text(expr)


def described(names: SymbolNames, node: torch.fx.Node) -> str:
    """What the value of a node is, in a line: ``float32[s0, 64]``; ``?`` where that cannot be said."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return "int" if isinstance(value, (int, torch.SymInt)) else "?"
    try:
        shape = ", ".join(str(names.size(size)) for size in value.shape)
    except SplitError:
        # A size that has no form as text; nothing checks it on calls.
        return "?"
    return f"{str(value.dtype).removeprefix('torch.')}[{shape}]"


def text(expr: Any) -> str:
    """Print an expression as Python that our call checks can run; refuse one that has no such form."""
    if expr.is_Integer or expr.is_Symbol:
        return str(expr)
    if isinstance(expr, sympy.Pow) and expr.args[1].is_Integer and int(expr.args[1]) > 0:
        return f"({text(expr.args[0])} ** {text(expr.args[1])})"
    if isinstance(expr, sympy.Not):
        return f"(not {text(expr.args[0])})"
    joint = next((joint for kind, joint in _JOINTS.items() if isinstance(expr, kind)), None)
    if joint is not None:
        return "(" + joint.join(text(arg) for arg in expr.args) + ")"
    name = type(expr).__name__
    if name in {"Max", "Min"}:
        return f"{name.lower()}({', '.join(sorted(text(arg) for arg in expr.args))})"
    if expr in (sympy.true, sympy.false):
        return str(bool(expr))
    raise SplitError(
        f"the size expression {expr} uses {name}, which stitchcache cannot check on a call. "
        "Give that dimension a static size, or rewrite the model to avoid it."
    )


def bounds(shape_env: Any, symbol: sympy.Symbol) -> tuple[int | None, int | None]:
    """Smallest and largest value that the capture assumed for a symbol; ``None`` is unbounded."""
    found = ops.assumed_range(shape_env, symbol)
    return (None, None) if found is None else (finite(found[0]), finite(found[1]))


def finite(bound: sympy.Basic | int) -> int | None:
    """An int, or ``None`` for any of the infinities that torch uses."""
    if isinstance(bound, ops.IntInfinity) or not sympy.sympify(bound).is_Integer:
        return None
    return int(bound) if abs(int(bound)) < 2**62 else None


def guards(shape_env: Any, names: SymbolNames) -> list[str]:
    """Relations between sizes met so far that the capture relied on, as Python expressions, sorted."""
    return sorted({text(fact) for fact in _about(names, ops.guarded_facts(shape_env))})


def relations(shape_env: Any, names: SymbolNames) -> list[str]:
    """Everything that torch knows about the symbols met so far, in no order."""
    # Also what it asserts of sizes that data decides: a compiler may use any of it.
    facts = ops.guarded_facts(shape_env) + ops.asserted_facts(shape_env)
    return [structure(fact) for fact in _about(names, facts)]


def _about(names: SymbolNames, facts: Iterable[Any]) -> Iterator[Any]:
    for fact in facts:
        if fact.free_symbols and all(symbol in names for symbol in fact.free_symbols):
            yield names.rename(fact)
