"""Take symbolic sizes out of the inputs of pieces.

AOTInductor turns a ``SymInt`` input into ``None``. A piece can read the size itself, from any tensor
input that has it as a dimension; where none has, it gets one more tensor, if need be an empty one
that carries the size in its shape.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.fx import GraphModule, Node

from stitchcache.errors import SplitError
from stitchcache.graph import symbols
from stitchcache.graph.split import submodule
from stitchcache.torchside.symbols import known_range
from stitchcache.torchside.tensors import fake_mode_of


def lower_sizes(split_gm: GraphModule, pieces: Collection[str]) -> set[str]:
    """Rewrite pieces and their calls so that pieces take tensors only.

    Args:
        split_gm: A split graph; changed in place.
        pieces: Names of the submodules to rewrite.

    Returns:
        Pieces left as they were, because they take a symbolic value that no tensor can carry (a
        float, a truth value, a size that may be negative).
    """
    left = set()
    for call in list(split_gm.graph.nodes):
        if call.op == "call_module" and call.target in pieces:
            piece = submodule(split_gm, str(call.target))
            if _can_lower(piece):
                _lower_call(split_gm, call, piece)
            else:
                left.add(str(call.target))
    for node in reversed(list(split_gm.graph.nodes)):
        if (
            node.op == "call_function"
            and isinstance(node.meta.get("val"), symbols.SYMBOLIC)
            and not node.users
        ):
            split_gm.graph.erase_node(node)
    split_gm.recompile()
    return left


def _can_lower(piece: GraphModule) -> bool:
    placeholders = [node for node in piece.graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        value: Any = node.meta.get("val")
        if not isinstance(value, symbols.SYMBOLIC) or not node.users:
            continue
        if not isinstance(value, torch.SymInt):
            return False
        if _find_dimension(placeholders, value) is None:
            low = known_range(value)[0]
            # Making the carrier guards an unbounded number against falling below zero.
            if (symbols.finite(low) or 0) < 0 or (symbols.example_of(value) or 0) < 0:
                return False
    return True


def _lower_call(split_gm: GraphModule, call: Node, piece: GraphModule) -> None:
    placeholders = [node for node in piece.graph.nodes if node.op == "placeholder"]
    arguments = list(call.args)
    symbolic = [
        i for i, node in enumerate(placeholders) if isinstance(node.meta.get("val"), symbols.SYMBOLIC)
    ]
    if not symbolic:
        return
    for index in symbolic:
        placeholder = placeholders[index]
        if not placeholder.users:
            continue
        source = _find_dimension(placeholders, placeholder.meta["val"])
        if source is None:
            carrier = _carrier(split_gm, call, arguments[index], placeholder)
            added = _add_placeholder(piece, placeholders[-1], carrier)
            placeholders.append(added)
            arguments.append(carrier)
            source = (added, _dimension_of(added, placeholder.meta["val"]) or 0)
        _read_inside(piece, placeholder, *source)
    for index in reversed(symbolic):
        piece.graph.erase_node(placeholders[index])
        del arguments[index]
    call.args = tuple(arguments)
    piece.recompile()


def _dimension_of(node: Node, size: Any) -> int | None:
    """Which dimension of a tensor node has exactly this size."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        wanted = symbols.expression(size)
        sizes: list[Any] = list(value.shape)
        for dim, actual in enumerate(sizes):
            if isinstance(actual, torch.SymInt) and symbols.expression(actual) == wanted:
                return dim
    return None


def _find_dimension(nodes: list[Node], size: Any) -> tuple[Node, int] | None:
    for node in nodes:
        dim = _dimension_of(node, size)
        if dim is not None:
            return node, dim
    return None


def _read_inside(piece: GraphModule, placeholder: Node, tensor: Node, dim: int) -> None:
    last = [node for node in piece.graph.nodes if node.op == "placeholder"][-1]
    with piece.graph.inserting_after(last):
        size = piece.graph.call_function(torch.ops.aten.sym_size.int, (tensor, dim))
    size.meta["val"] = placeholder.meta["val"]
    placeholder.replace_all_uses_with(size)


def _add_placeholder(piece: GraphModule, last: Node, carrier: Node) -> Node:
    with piece.graph.inserting_after(last):
        added = piece.graph.placeholder(carrier.name)
    added.meta = dict(carrier.meta)
    return added


def _carrier(split_gm: GraphModule, call: Node, size: Any, placeholder: Node) -> Node:
    """A tensor of the stitching graph that has the size as a dimension; made if there is none."""
    value = placeholder.meta["val"]
    for node in split_gm.graph.nodes:
        if node is call:
            break
        if _dimension_of(node, value) is not None:
            found: Node = node
            return found
    # There is one: the size is a symbol of a traced graph.
    fake_mode = fake_mode_of(node.meta.get("val") for node in split_gm.graph.nodes)
    if fake_mode is None:
        raise SplitError("a graph with symbolic sizes has no fake tensors.")
    with split_gm.graph.inserting_before(call):
        made: Node = split_gm.graph.call_function(torch.ops.aten.empty.memory_format, ([size, 0],))
    with fake_mode:
        made.meta["val"] = torch.empty([value, 0])
    return made
