"""Rewrite the stitching graph so that what crosses into a piece is what the piece was compiled for.

- Tensors of the model become attributes that are bound once, in place of placeholders.
- Symbolic sizes go: AOTInductor turns a ``SymInt`` input into ``None``. A piece can read the size itself,
  from any tensor input that has it as a dimension; where none has, it gets one more tensor, if need be an
  empty one that carries the size in its shape.
- Strides are pinned. A compiled piece relies on the strides of its inputs and does not check them: given
  others, it returns wrong numbers without an error. Results of our own compiled pieces have the promised
  strides (each is compared before it is committed), and the caller's inputs are checked on every call.
  What a splitting op returns, or a piece that is not compiled, is neither. The stitching code brings it
  into the promised order: one ``contiguous`` call, which does nothing when the strides are right already.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from stitchcache.errors import SplitError
from stitchcache.graph import symbols
from stitchcache.graph.split import drop_unused_sizes, submodule
from stitchcache.torchside.ops import known_range
from stitchcache.torchside.tensors import fake_mode_of
from stitchcache.types import BOUND

_EMPTY = torch.ops.aten.empty.memory_format


def bind_placeholders(
    split_gm: GraphModule, tensors: Mapping[str, tuple[str, torch.Tensor]]
) -> dict[str, str]:
    """Replace placeholders by ``get_attr`` nodes under ``bound.``.

    Args:
        split_gm: A split graph; changed in place.
        tensors: Placeholder name to qualified name in the model, and tensor.

    Returns:
        Attribute path to qualified name, for the placeholders that are used.
    """
    attributes: dict[str, str] = {}
    for node in list(split_gm.graph.nodes):
        if node.op != "placeholder" or node.name not in tensors:
            continue
        if node.users:
            name, tensor = tensors[node.name]
            path = f"{BOUND}.{name}"
            _register(split_gm, path, tensor)
            with split_gm.graph.inserting_before(node):
                attribute = split_gm.graph.get_attr(path)
            attribute.meta = dict(node.meta)
            node.replace_all_uses_with(attribute)
            attributes[path] = name
        split_gm.graph.erase_node(node)
    # fx wants placeholders before everything else.
    first = next((node for node in split_gm.graph.nodes if node.op != "placeholder"), None)
    for node in list(split_gm.graph.nodes):
        if node.op == "placeholder" and first is not None:
            first.prepend(node)
    split_gm.recompile()
    return attributes


def drop_placeholders(split_gm: GraphModule, names: list[str]) -> list[str]:
    """Remove placeholders that nothing uses.

    Args:
        split_gm: A split graph; changed in place.
        names: Placeholders that may go.

    Returns:
        Those that could not go because something uses them.
    """
    kept = []
    for node in list(split_gm.graph.nodes):
        if node.op == "placeholder" and node.name in names:
            if node.users:
                kept.append(node.name)
            else:
                split_gm.graph.erase_node(node)
    split_gm.recompile()
    return kept


def _register(root: torch.nn.Module, path: str, tensor: torch.Tensor) -> None:
    *parents, name = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, torch.nn.Module())
        root = root.get_submodule(part)
    if isinstance(tensor, torch.nn.Parameter):
        root.register_parameter(name, tensor)
    else:
        root.register_buffer(name, tensor)


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
    drop_unused_sizes(split_gm.graph)
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
    values = [node.meta.get("val") for node in placeholders]
    symbolic = [index for index, value in enumerate(values) if isinstance(value, symbols.SYMBOLIC)]
    if not symbolic:
        return
    for index in symbolic:
        placeholder = placeholders[index]
        if not placeholder.users:
            continue
        source = _find_dimension(placeholders, values[index])
        if source is None:
            carrier = _carrier(split_gm, call, arguments[index], values[index])
            with piece.graph.inserting_after(placeholders[-1]):
                added = piece.graph.placeholder(carrier.name)
            added.meta = dict(carrier.meta)
            placeholders.append(added)
            arguments.append(carrier)
            source = (added, _dimension_of(added, values[index]) or 0)
        with piece.graph.inserting_after(placeholders[-1]):
            size = piece.graph.call_function(torch.ops.aten.sym_size.int, source)
        size.meta["val"] = values[index]
        placeholder.replace_all_uses_with(size)
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


def _carrier(split_gm: GraphModule, call: Node, size: Any, value: Any) -> Node:
    """A tensor of the stitching graph that has a size as a dimension; one is made if there is none."""
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
        maker = _maker(node)
        own = maker in uncompiled
        # Placeholders and tensors of the model are checked on calls; what is empty is made as promised.
        foreign = node.op not in {"placeholder", "get_attr"} and node.target is not _EMPTY
        if not isinstance(value, torch.Tensor) or not (own or (foreign and maker not in relied_on)):
            continue
        relies = any(user.op == "call_module" and user.target in relied_on for user in node.users)
        if relies and value.layout == torch.strided:
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


def _maker(node: Node) -> str | None:
    """The submodule whose result, or an item of whose result, a node is; ``None`` if it is none."""
    source = node.args[0] if node.args else None
    return str(source.target) if isinstance(source, Node) and source.op == "call_module" else None


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
