"""Operators as objects: their classes, their schemas, and what the dispatcher knows of them.

Uses ``torch._ops``, ``OpOverload._schema``, ``_overloadname``, ``_qualified_op_name``,
``torch._C._dispatch_has_kernel_for_dispatch_key``, and ``torch._library.custom_ops.CustomOpDef``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket, _HigherOrderNamespace, _OpNamespace

__all__ = [
    "CustomOpDef",
    "HigherOrderNamespace",
    "HigherOrderOperator",
    "OpNamespace",
    "OpOverload",
    "OpOverloadPacket",
    "autocast_has_rule",
    "custom_op_parts",
    "is_view",
    "qualified_name",
    "schema_of",
]

SEEN = ("2.11", "2.13")

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


def custom_op_parts(op: CustomOpDef) -> dict[str, Any]:
    """What a trace may see of an op made with ``torch.library.custom_op``: its signature and its functions.

    What else the object holds is about autograd, or about how a call finds the kernel.
    """
    names = ("_schema", "_tags", "_init_fn", "_abstract_fn", "_torch_dispatch_fns", "_autocast_dtype")
    parts = {name: getattr(op, name, None) for name in names}
    return {**parts, "_tags": sorted(map(str, parts["_tags"] or ())), "_name": op._qualname}


def autocast_has_rule(op: OpOverload, device: str) -> bool:
    """Whether autocast knows an op by itself, rather than the ops that it is made of.

    Args:
        op: An op.
        device: A device type.
    """
    key = _AUTOCAST_KEYS.get(device)
    name = f"{op._schema.name}.{op._schema.overload_name}".rstrip(".")
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
