"""Operators and symbolic sizes: what nodes of a graph hold.

Uses ``torch._ops``, ``OpOverload._schema``, ``_overloadname``, ``_qualified_op_name``, ``_can_decompose``,
``torch._C._dispatch_has_kernel_for_dispatch_key``, fields of
``SymNode`` and ``ShapeEnv`` that torch documents for writers of backends, and ``torch.utils._sympy``.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._ops import (
    HigherOrderOperator as HigherOrderOperator,
    OpOverload as OpOverload,
    OpOverloadPacket as OpOverloadPacket,
    _HigherOrderNamespace,
    _OpNamespace,
)

SEEN = ("2.11", "2.13", "2.15")

_SYMPY = {
    "CleanDiv": "functions",
    "FloorDiv": "functions",
    "Mod": "functions",
    "PythonMod": "functions",
    "IntInfinity": "numbers",
}


def __getattr__(name: str) -> Any:
    """A class that torch adds to sympy. On demand, as a warm start has no use for sympy."""
    if name not in _SYMPY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"torch.utils._sympy.{_SYMPY[name]}"), name)


HigherOrderNamespace = _HigherOrderNamespace
OpNamespace = _OpNamespace

_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def schema_of(op: OpOverload) -> Any:
    """An op's signature: ``name``, ``arguments``, ``returns``, ``is_mutable``."""
    return op._schema


def is_view(op: OpOverload) -> bool:
    """Whether a result of an op shares memory with an argument that the op does not write."""
    returns = op._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def qualified_name(op: OpOverload | OpOverloadPacket | HigherOrderOperator) -> tuple[str, str | None]:
    """The name that an op is registered under, and its overload; ``None`` where there is none."""
    if isinstance(op, OpOverload):
        return op._schema.name, op._overloadname
    if isinstance(op, OpOverloadPacket):
        return op._qualified_op_name, None
    return f"higher_order::{op.name()}", None  # type: ignore[no-untyped-call]


def made_of_others(op: Any) -> OpOverload | None:
    """The op that a function is, if it is a library's and made of other ops; ``None`` for any other."""
    names = op.overloads() if type(op) is OpOverloadPacket else []  # type: ignore[no-untyped-call]
    op = getattr(op, names[0]) if len(names) == 1 else op
    ours = isinstance(op, OpOverload) and op.namespace not in {"aten", "prim", "prims"}
    return op if ours and op._can_decompose() else None


def autocast_has_rule(op: OpOverload, device: str) -> bool:
    """Whether autocast knows an op by itself on a type of device, rather than the ops that it is made of."""
    key = _AUTOCAST_KEYS.get(device)
    name = f"{op._schema.name}.{op._schema.overload_name}".rstrip(".")
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


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
