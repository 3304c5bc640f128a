"""What is known of a call's result before it is made."""

from __future__ import annotations

import operator

import torch

from stitchcache.torchside.ops import OpOverload, schema_of


def getitem_index(user: torch.fx.Node, node: torch.fx.Node) -> int | None:
    """The index, where a node does nothing but take one item of another.

    Args:
        user: The node that uses it.
        node: The node that is used.

    Returns:
        The index, or ``None`` where ``user`` does anything else.
    """
    if user.op != "call_function" or user.target is not operator.getitem or user.kwargs:
        return None
    if len(user.args) != 2 or user.args[0] is not node:
        return None
    index = user.args[1]
    return index if isinstance(index, int) and type(index) is int else None


def items_used(node: torch.fx.Node, length: int | None) -> dict[int, list[torch.fx.Node]] | None:
    """Which items of a result are used, where nothing but items of it is.

    Args:
        node: The node whose result it is.
        length: How many items it has, if that is known; indices then count from the front.

    Returns:
        Index to the nodes that take that item, or ``None`` where the whole is used.
    """
    found: dict[int, list[torch.fx.Node]] = {}
    for user in node.users:
        index = getitem_index(user, node)
        if index is None or (length is not None and not -length <= index < length):
            return None
        found.setdefault(index if length is None else index % length, []).append(user)
    return found


def result_length(node: torch.fx.Node, module: torch.nn.Module | None) -> int | None:
    """How many items a call's result has, where that is certain.

    Unpacking needs the exact number, and a result that is a sequence: a tensor or dict would unpack
    into something else than what indexing gives.

    Args:
        node: The call.
        module: The submodule that it calls, if any.

    Returns:
        The number, or ``None`` where it is unknown or may change from call to call.
    """
    if isinstance(module, torch.fx.GraphModule):
        output = next((n for n in reversed(module.graph.nodes) if n.op == "output"), None)
        if output is not None and isinstance(output.args[0], (tuple, list)):
            return len(output.args[0])
    value = node.meta.get("val", node.meta.get("example_value"))
    # A list that an op returns (split, unbind) may have another length at another size.
    if isinstance(value, tuple) or (module is not None and isinstance(value, list)):
        return len(value)
    if isinstance(node.target, OpOverload):
        returns = schema_of(node.target).returns
        return len(returns) if len(returns) > 1 else None
    return None
