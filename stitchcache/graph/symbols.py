"""Symbolic sizes: read them off fake tensors and write them with canonical names.

torch names symbols by where they came from (``s77``), so the same graph has other names in another
capture. Here a symbol is called ``s0``, ``s1``, ... in order of first appearance, and every
expression is rebuilt over those names before it is printed, because sympy orders terms by name.

Reads ``SymInt.node.expr`` and ``FakeTensor.fake_mode.shape_env``, which torch documents for backend
writers but does not promise. Tried with torch 2.11 and 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Mod, PythonMod
from torch.utils._sympy.numbers import IntInfinity

from stitchcache.errors import SplitError

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def expression(value: Any) -> Any:
    """The sympy expression behind a size, with known equalities between symbols applied."""
    if isinstance(value, SYMBOLIC):
        return value.node.expr
    return sympy.sympify(value)


def shape_environment(graph: torch.fx.Graph) -> Any | None:
    """The ``ShapeEnv`` that a graph's symbolic sizes live in; ``None`` if all sizes are static."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, SYMBOLIC):
            return value.node.shape_env
        if isinstance(value, torch.Tensor):
            for size in (*value.shape, *stride_of(value)):
                if isinstance(size, SYMBOLIC):
                    return size.node.shape_env
    return None


def stride_of(value: torch.Tensor) -> tuple[Any, ...]:
    """Strides of a tensor; empty for layouts that have none."""
    return tuple(value.stride()) if value.layout == torch.strided else ()


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

        New symbols of one expression are named in the order in which a walk of its printed form
        meets them; a rare tie can only cost a miss.
        """
        for symbol in sorted(expr.free_symbols - self._canonical.keys(), key=str):
            index = len(self._canonical)
            self._canonical[symbol] = sympy.Symbol(f"s{index}", integer=True, positive=True)
        return expr.xreplace(self._canonical)

    def size(self, value: int | torch.SymInt) -> int | str:
        """A size as records keep it: an int, or an expression as text."""
        if not isinstance(value, SYMBOLIC):
            return int(value)
        expr = self.rename(expression(value))
        return int(expr) if expr.is_Integer else text(expr)


def text(expr: Any) -> str:
    """Print an expression as Python that our call checks can run.

    Raises:
        SplitError: It holds a function that has no such form.
    """
    if expr.is_Integer or expr.is_Symbol:
        return str(expr)
    if isinstance(expr, (FloorDiv, CleanDiv)):
        return f"({text(expr.args[0])} // {text(expr.args[1])})"
    if isinstance(expr, (Mod, PythonMod, sympy.Mod)):
        return f"({text(expr.args[0])} % {text(expr.args[1])})"
    if isinstance(expr, sympy.Pow) and expr.args[1].is_Integer and int(expr.args[1]) > 0:
        return f"({text(expr.args[0])} ** {text(expr.args[1])})"
    if isinstance(expr, sympy.Not):
        return f"(not {text(expr.args[0])})"
    joint = next((joint for kind, joint in _JOINTS if isinstance(expr, kind)), None)
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


_JOINTS: tuple[tuple[type, str], ...] = (
    (sympy.Add, " + "),
    (sympy.Mul, " * "),
    (sympy.And, " and "),
    (sympy.Or, " or "),
    (sympy.Eq, " == "),
    (sympy.Ne, " != "),
    (sympy.Ge, " >= "),
    (sympy.Gt, " > "),
    (sympy.Le, " <= "),
    (sympy.Lt, " < "),
)


def bounds(shape_env: Any, symbol: sympy.Symbol) -> tuple[int | None, int | None]:
    """Smallest and largest value that the capture assumed for a symbol; ``None`` is unbounded."""
    value_range = shape_env.var_to_range.get(symbol)
    if value_range is None:
        return None, None
    return finite(value_range.lower), finite(value_range.upper)


def finite(bound: sympy.Basic | int) -> int | None:
    """An int, or ``None`` for any of the infinities that torch uses."""
    if isinstance(bound, IntInfinity) or not sympy.sympify(bound).is_Integer:
        return None
    return int(bound) if abs(int(bound)) < 2**62 else None


def guards(shape_env: Any, names: SymbolNames, *, only_known: bool = False) -> list[str]:
    """Relations between sizes that the capture relied on, canonical and sorted.

    Args:
        shape_env: torch's ``ShapeEnv``.
        names: Names to print with.
        only_known: Leave out relations over symbols that ``names`` has not met: they cannot
            concern the graph at hand.

    Returns:
        Python expressions that must hold; relations that hold by themselves are left out.
    """
    found = set()
    for guard in shape_env.guards:
        expr = shape_env.replace(guard.expr)
        if not expr.free_symbols or (only_known and not all(s in names for s in expr.free_symbols)):
            continue
        found.add(text(names.rename(expr)))
    return sorted(found)
