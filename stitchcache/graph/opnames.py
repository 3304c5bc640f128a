"""Names of what a node calls, the same in every process."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from stitchcache.torchside.ops import HigherOrderOperator, OpOverload, OpOverloadPacket


def target_name(target: Any) -> str:
    """A stable name for the target of a ``call_function`` node.

    Args:
        target: An op, an overload, a packet, a higher-order op or any function.

    Returns:
        ``aten::add.Tensor`` for ops, ``module.qualname`` for functions.
    """
    if isinstance(target, OpOverload):
        return f"{target.namespace}::{str(target).removeprefix(target.namespace + '.')}"
    if isinstance(target, OpOverloadPacket):
        return str(target).replace(".", "::", 1)
    if isinstance(target, HigherOrderOperator):
        return f"higher_order::{target}"
    module = getattr(target, "__module__", None) or type(target).__module__
    name: Any = getattr(target, "__qualname__", None) or getattr(
        target, "__name__", type(target).__qualname__
    )
    return f"{module}.{name}"


def matches(target: Any, wanted: str) -> bool:
    """Whether a splitting op's name, as a user writes it, means this target.

    ``ns::op`` means every overload, ``ns::op.overload`` one; a dot may stand for the colons.
    """
    name = target_name(target)
    if name == wanted:
        return True
    if "::" not in name:
        return False
    namespace, _, op = name.partition("::")
    base = op.split(".")[0]
    return wanted in {f"{namespace}::{base}", f"{namespace}.{base}", f"{namespace}.{op}"}


def ops_in(gm: torch.fx.GraphModule) -> list[str]:
    """Names of all ops that a graph calls, most frequent first."""
    counts = Counter(target_name(n.target) for n in gm.graph.nodes if n.op == "call_function")
    return [name for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
