"""Symbolic sizes and what torch knows about them.

Uses fields of ``SymNode`` and ``ShapeEnv`` that torch documents for writers of backends and does not promise.
Does not import sympy: a warm start that loads an eager piece imports this file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

SEEN = ("2.11", "2.13")

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def expression(value: Any) -> Any:
    """The sympy expression behind a size, with known equalities between symbols applied."""
    if isinstance(value, SYMBOLIC):
        return value.node.expr
    import sympy

    return sympy.sympify(value)


def example_of(value: Any) -> Any:
    """What a size or number was in the capture's example; ``None`` if only data decides it.

    Reading it adds no guard.
    """
    return value.node.hint if isinstance(value, SYMBOLIC) else value


def constant_of(value: Any) -> int | None:
    """The number that a ``SymInt`` always is; ``None`` if it may vary."""
    constant: int | None = value.node.maybe_as_int() if isinstance(value, torch.SymInt) else None
    return constant


def environment_of(value: Any) -> Any | None:
    """The ``ShapeEnv`` that a symbolic size lives in; ``None`` for a plain number."""
    return value.node.shape_env if isinstance(value, SYMBOLIC) else None


def known_range(value: torch.SymInt) -> tuple[Any, Any]:
    """Bounds of a symbolic size, as sympy numbers."""
    bounds = value.node.shape_env.bound_sympy(value.node.expr)
    return bounds.lower, bounds.upper


def assumed_range(shape_env: Any, symbol: Any) -> tuple[Any, Any] | None:
    """Bounds that the capture assumed for a symbol, as sympy numbers; ``None`` if it has none."""
    found = shape_env.var_to_range.get(symbol)
    return None if found is None else (found.lower, found.upper)


def guarded_facts(shape_env: Any) -> list[Any]:
    """Relations between sizes that the capture relied on."""
    return [shape_env.replace(guard.expr) for guard in shape_env.guards]


def asserted_facts(shape_env: Any) -> list[Any]:
    """What the capture asserted of sizes that only data decides."""
    asserted = shape_env.deferred_runtime_asserts.values()
    return [shape_env.replace(item.expr) for items in asserted for item in items]


@contextlib.contextmanager
def without_guards(shape_env: Any | None) -> Iterator[None]:
    """Let nobody add assumptions about sizes meanwhile."""
    with shape_env.suppress_guards() if shape_env is not None else contextlib.nullcontext():
        yield
