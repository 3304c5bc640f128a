"""Rewrite the stitching graph so that what crosses into a piece is what the piece was compiled for.

Tensors of the model become attributes. Symbolic sizes go, as AOTInductor turns a ``SymInt`` input into None:
a piece reads them from a tensor that has them as a dimension. Strides that nobody promised are pinned,
because a compiled piece that is given others returns wrong numbers without an error (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from stitchcache.errors import SplitError
from stitchcache.graph import symbols
from stitchcache.graph.effects import attribute_of, place_attribute
from stitchcache.graph.split import drop_unused_sizes
from stitchcache.torchside import fake_mode_of
from stitchcache.torchside.ops import known_range
from stitchcache.types import BOUND

_EMPTY = torch.ops.aten.empty.memory_format


def bind_placeholders(
    split_gm: GraphModule, tensors: Mapping[str, tuple[str, torch.Tensor]], constants: Collection[str] = ()
) -> dict[str, str]:
    """Replace placeholders by ``get_attr`` nodes under ``bound.``, in place; gives their paths and names.

    ``tensors`` has a placeholder's qualified name in the model, and tensor. ``constants`` are further
    placeholders to remove; a SplitError if the graph uses one.
    """
    attributes: dict[str, str] = {}
    graph = split_gm.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    # fx wants placeholders before everything else.
    first = next((node for node in graph.nodes if node.op != "placeholder"), None)
    for node in placeholders:
        if node.name not in tensors and node.name not in constants:
            continue
        if node.users and node.name in constants:
            raise SplitError(
                f"the graph computes with {node.name}, which the capture should have baked in. "
                "Give this argument as part of dynamic_shapes, or as a tensor."
            )
        if node.users:
            name, tensor = tensors[node.name]
            path = f"{BOUND}.{name}"
            place_attribute(split_gm, path, tensor)
            with graph.inserting_before(first):
                attribute = graph.get_attr(path)
            attribute.meta = dict(node.meta)
            node.replace_all_uses_with(attribute)
            attributes[path] = name
        graph.erase_node(node)
    split_gm.recompile()
    return attributes


def lower_sizes(split_gm: GraphModule, pieces: Collection[str]) -> set[str]:
    """Rewrite these submodules of a split graph, and their calls, so that they take tensors only.

    Gives those left as they were, because they take a symbolic value that no tensor can carry (a float, a
    truth value, a size that may be negative).
    """
    left = set()
    for call in list(split_gm.graph.nodes):
        if call.op == "call_module" and call.target in pieces:
            piece: GraphModule = attribute_of(split_gm, str(call.target))
            placeholders = [node for node in piece.graph.nodes if node.op == "placeholder"]
            sizes = [node for node in placeholders if isinstance(node.meta.get("val"), symbols.SYMBOLIC)]
            if not all(_can_lower(node, placeholders) for node in sizes):
                left.add(str(call.target))
            elif sizes:
                _lower_call(split_gm, call, piece, sizes)
    drop_unused_sizes(split_gm.graph)
    split_gm.recompile()
    return left


def _can_lower(node: Node, placeholders: list[Node]) -> bool:
    size = node.meta["val"]
    if not node.users:
        return True
    if not isinstance(size, torch.SymInt) or _find_dimension(placeholders, size) is not None:
        return isinstance(size, torch.SymInt)
    # Making the carrier guards an unbounded number against falling below zero.
    return (symbols.finite(known_range(size)[0]) or 0) >= 0 and (symbols.example_of(size) or 0) >= 0


def _lower_call(split_gm: GraphModule, call: Node, piece: GraphModule, sizes: list[Node]) -> None:
    placeholders = [node for node in piece.graph.nodes if node.op == "placeholder"]
    arguments = dict(zip(placeholders, call.args, strict=True))
    for placeholder in sizes:
        value = placeholder.meta["val"]
        if not placeholder.users:
            continue
        source = _find_dimension(arguments, value)
        if source is None:
            carrier = _carrier(split_gm, call, arguments[placeholder], value)
            with piece.graph.inserting_after(next(reversed(arguments))):
                added = piece.graph.placeholder(carrier.name)
            added.meta = dict(carrier.meta)
            arguments[added] = carrier
            source = _find_dimension([added], value)
        with piece.graph.inserting_after(next(reversed(arguments))):
            size = piece.graph.call_function(torch.ops.aten.sym_size.int, source)
        size.meta["val"] = value
        placeholder.replace_all_uses_with(size)
    for placeholder in sizes:
        piece.graph.erase_node(placeholder)
        del arguments[placeholder]
    call.args = tuple(arguments.values())
    piece.recompile()


def _find_dimension(nodes: Iterable[Node], size: Any) -> tuple[Node, int] | None:
    """The first tensor that has exactly this size as a dimension, and which one that is."""
    wanted = symbols.expression(size)
    for node in nodes:
        value = node.meta.get("val")
        sizes: list[Any] = list(value.shape) if isinstance(value, torch.Tensor) else []
        for dim, actual in enumerate(sizes):
            if isinstance(actual, torch.SymInt) and symbols.expression(actual) == wanted:
                return node, dim
    return None


def _carrier(split_gm: GraphModule, call: Node, size: Any, value: Any) -> Node:
    """A tensor of the stitching graph that has a size as a dimension; one is made if there is none."""
    nodes = list(split_gm.graph.nodes)
    found = _find_dimension(nodes[: nodes.index(call)], value)
    if found is not None:
        return found[0]
    # There is one: the size is a symbol of a traced graph.
    fake_mode = fake_mode_of(node.meta.get("val") for node in nodes)
    if fake_mode is None:
        raise SplitError("a graph with symbolic sizes has no fake tensors.")
    with split_gm.graph.inserting_before(call):
        made: Node = split_gm.graph.call_function(_EMPTY, ([size, 0],))
    with fake_mode:
        made.meta["val"] = torch.empty([value, 0])
    return made


def pin_strides(
    split_gm: GraphModule,
    pieces: Collection[str],
    passive: Collection[str] = (),
    uncompiled: Collection[str] = (),
) -> None:
    """Insert stride pins into a split graph, in place; a SplitError for strides that overlap or leave gaps.

    ``passive`` submodules only make views and allocate: the strides of their results follow from those of
    their inputs, so the inputs are pinned instead. ``uncompiled`` ones of ``pieces`` run op by op: their
    results have the strides that eager gives them, which are not always those that fake tensors promised.
    """
    relied_on = {*pieces, *passive}
    for node in list(split_gm.graph.nodes):
        value = node.meta.get("val")
        source = node.args[0] if node.args else None
        # The submodule whose result, or an item of whose result, the node is.
        maker = source.target if isinstance(source, Node) and source.op == "call_module" else None
        own = maker in uncompiled
        # Placeholders and tensors of the model are checked on calls; what is empty is made as promised.
        foreign = node.op not in {"placeholder", "get_attr"} and node.target is not _EMPTY
        if not isinstance(value, torch.Tensor) or not (own or (foreign and maker not in relied_on)):
            continue
        relies = any(user.op == "call_module" and user.target in relied_on for user in node.users)
        if relies and value.layout == torch.strided:
            order = dense_order(value)
            if order is not None:
                _pin(split_gm.graph, node, value, order)
            elif not own:
                # A view with gaps of an uncompiled piece has the strides of a view; nobody else's need have.
                raise SplitError(
                    f"{node.name} reaches a piece with strides {tuple(value.stride())} for shape "
                    f"{tuple(value.shape)}; overlapping or padded results of a splitting op cannot be "
                    "promised to compiled code. Let the op return a contiguous tensor."
                )
    split_gm.recompile()


def _pin(graph: Graph, node: Node, value: torch.Tensor, order: list[int]) -> None:
    """Let all users of a value take it in the promised order of dimensions."""
    users = list(node.users)
    back = [order.index(dim) for dim in range(len(order))]
    # contiguous() goes by the order of dimensions, so they are permuted there and back for another one.
    steps = [("permute", order), ("contiguous", []), ("permute", back)]
    pinned = node
    for method, dims in steps if order != sorted(order) else steps[1:2]:
        with graph.inserting_after(pinned):
            pinned = graph.call_method(method, (pinned, *dims))
        value = value.permute(*dims) if dims else value
        pinned.meta["val"] = value
    for user in users:
        user.replace_input_with(node, pinned)


def dense_order(value: torch.Tensor) -> list[int] | None:
    """The order of dimensions in which a tensor (of static or symbolic sizes) is contiguous, if any."""
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
