"""Pin the strides of what reaches a piece from code that we did not compile.

A compiled piece relies on the strides of its inputs and does not check them: given others, it
returns wrong numbers without an error. Results of our own compiled pieces have the promised strides
(each is compared before it is committed), and the caller's inputs are checked on every call. What a
splitting op returns, or a piece that is not compiled, is neither, so the stitching code brings it into
the promised order: one ``contiguous`` call, which does nothing when the strides are right already.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import GraphModule, Node

from stitchcache.errors import SplitError
from stitchcache.graph import symbols


def pin_strides(
    split_gm: GraphModule,
    pieces: Collection[str],
    passive: Collection[str] = (),
    uncompiled: Collection[str] = (),
) -> None:
    """Insert stride pins into the stitching graph.

    Args:
        split_gm: A split graph; changed in place.
        pieces: Names of the submodules that are compiled.
        passive: Names of the submodules that only make views and allocate: the strides of their
            results follow from those of their inputs, so the inputs are pinned instead.
        uncompiled: Those of ``pieces`` that run op by op. Their results have the strides that eager gives
            them, which are not always those that fake tensors promised.

    Raises:
        SplitError: A value cannot be pinned because its strides overlap or leave gaps.
    """
    relied_on = {*pieces, *passive}
    for node in list(split_gm.graph.nodes):
        value = node.meta.get("val")
        own = _is_from(node, uncompiled)
        if not isinstance(value, torch.Tensor) or not (own or _is_foreign(node, relied_on)):
            continue
        users = [u for u in node.users if u.op == "call_module" and u.target in relied_on]
        if users and value.layout == torch.strided:
            order = dense_order(value)
            if order is not None:
                _pin(split_gm, node, value, order)
            elif not own:
                # A view with gaps of an uncompiled piece has the strides of a view; nobody else's need have.
                raise SplitError(
                    f"{node.name} reaches a piece with strides {tuple(value.stride())} for shape "
                    f"{tuple(value.shape)}; overlapping or padded results of a splitting op cannot be "
                    "promised to compiled code. Let the op return a contiguous tensor."
                )
    split_gm.recompile()


def _is_from(node: Node, pieces: Collection[str]) -> bool:
    source = node.args[0] if node.op == "call_function" and node.args else None
    return isinstance(source, Node) and source.op == "call_module" and source.target in pieces


def _is_foreign(node: Node, ours: Collection[str]) -> bool:
    """Whether a value of the stitching graph comes from code that was not compiled."""
    if node.op in {"placeholder", "get_attr"}:
        return False
    source = node.args[0] if node.args else None
    if isinstance(source, Node) and source.op == "call_module":
        return source.target not in ours
    return node.target is not torch.ops.aten.empty.memory_format


def _pin(split_gm: GraphModule, node: Node, value: torch.Tensor, order: list[int]) -> None:
    graph = split_gm.graph
    users = list(node.users)
    identity = list(range(len(order)))
    with graph.inserting_after(node):
        if order == identity:
            pinned = graph.call_method("contiguous", (node,))
            pinned.meta["val"] = value
        else:
            permuted = graph.call_method("permute", (node, *order))
            permuted.meta["val"] = value.permute(*order)
            with graph.inserting_after(permuted):
                dense = graph.call_method("contiguous", (permuted,))
                dense.meta["val"] = permuted.meta["val"]
            with graph.inserting_after(dense):
                back = [order.index(dim) for dim in identity]
                pinned = graph.call_method("permute", (dense, *back))
                pinned.meta["val"] = value
    for user in users:
        user.replace_input_with(node, pinned)


def dense_order(value: torch.Tensor) -> list[int] | None:
    """The order of dimensions in which a tensor is contiguous; ``None`` if there is none.

    Args:
        value: A tensor with static or symbolic sizes.
    """
    shape = [symbols.expression(size) for size in value.shape]
    stride = [symbols.expression(size) for size in value.stride()]
    remaining = [dim for dim in range(len(shape)) if shape[dim] != 1]
    order: list[int] = []
    expected = symbols.expression(1)
    while remaining:
        found = next((dim for dim in reversed(remaining) if stride[dim] == expected), None)
        if found is None:
            return None
        expected = expected * shape[found]
        order.insert(0, found)
        remaining.remove(found)
    if order == sorted(order):
        return list(range(len(shape)))
    return [dim for dim in range(len(shape)) if shape[dim] == 1] + order
