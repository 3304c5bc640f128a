"""Split a graph at chosen ops into pieces.

The result calls one submodule a piece, in the graph's own order, so that mutation is safe. Written
here instead of using ``torch.fx.passes.split_module``, because that one returns single results bare
before torch 2.13, may reorder, and lets symbolic sizes leave a piece, which AOTInductor cannot do.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.fx import Graph, GraphModule, Node

from stitchcache.errors import SplitError, SplittingOpNotFoundError
from stitchcache.graph.effects import matches, ops_in
from stitchcache.graph.symbols import SYMBOLIC


@dataclass(frozen=True, slots=True)
class SplitItem:
    """One submodule of a split graph.

    Args:
        submod_name: Its name in the split graph, such as ``submod_0``.
        graph_id: Its position.
        is_splitting_graph: Whether it holds splitting ops; those are never compiled.
        graph: Its graph; always returns a tuple.
    """

    submod_name: str
    graph_id: int
    is_splitting_graph: bool
    graph: GraphModule


def split_graph(
    gm: GraphModule,
    splitting_ops: Sequence[str],
    *,
    missing: Literal["error", "ignore"] = "error",
) -> tuple[GraphModule, list[SplitItem]]:
    """Split a graph at chosen ops.

    Args:
        gm: A flat graph; not changed. Node metadata (``meta["val"]``) is kept.
        splitting_ops: Names such as ``"aten::scaled_dot_product_attention"`` (every overload) or
            ``"mylib::attention.default"``. Neighbouring splitting ops share a submodule.
        missing: What to do when an op does not occur in the graph.

    Returns:
        A graph that calls ``submod_0``, ``submod_1``, ... in order, and the submodules.

    Raises:
        SplittingOpNotFoundError: An op does not occur and ``missing`` is ``"error"``.
        SplitError: The graph has no output.
    """
    if missing == "error":
        check_splitting_ops(gm, splitting_ops)
    partitions = _assign(gm, splitting_ops)
    _mark_outputs(partitions, gm)
    return _Stitcher(gm, partitions).build()


def check_splitting_ops(gm: GraphModule, splitting_ops: Sequence[str]) -> None:
    """Refuse splitting ops that do not occur in a graph.

    Raises:
        SplittingOpNotFoundError: Names the op, and what there is instead.
    """
    targets = {node.target for node in gm.graph.nodes if node.op == "call_function"}
    for wanted in splitting_ops:
        if not any(matches(target, wanted) for target in targets):
            present = ops_in(gm)
            raise SplittingOpNotFoundError(
                f"splitting op {wanted!r} is not in the graph. Its most frequent ops are "
                f"{', '.join(present[:8])}. Take one of these, or leave the op out.",
                op=wanted,
                present=present,
            )


@dataclass(slots=True)
class _Partition:
    """Nodes that become one submodule."""

    splitting: bool
    nodes: list[Node] = field(default_factory=list)
    outputs: dict[Node, None] = field(default_factory=dict)


def submodule(gm: GraphModule, name: str) -> GraphModule:
    """A submodule that is a graph.

    Raises:
        SplitError: It is another kind of module.
    """
    found = gm.get_submodule(name)
    if not isinstance(found, GraphModule):
        raise SplitError(f"submodule {name!r} is a {type(found).__qualname__}, not a graph.")
    return found


def drop_unused_sizes(graph: Graph) -> None:
    """Erase nodes that compute sizes which nothing uses."""
    for node in reversed(list(graph.nodes)):
        if _is_symbolic(node) and not node.users:
            graph.erase_node(node)


def _is_symbolic(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), SYMBOLIC)


def _assign(gm: GraphModule, splitting_ops: Sequence[str]) -> list[_Partition]:
    """Cut the node list where splitting ops begin and end."""
    partitions: list[_Partition] = []
    home: dict[Node, _Partition] = {}
    for node in gm.graph.nodes:
        if node.op in {"placeholder", "output", "get_attr"}:
            continue
        if _is_symbolic(node) and not any(source in home for source in node.all_input_nodes):
            continue
        splitting = node.op == "call_function" and any(
            matches(node.target, wanted) for wanted in splitting_ops
        )
        if node.target is operator.getitem and node.args[0] in home and len(node.all_input_nodes) == 1:
            partition = home[node.args[0]]
        else:
            if not partitions or partitions[-1].splitting != splitting:
                partitions.append(_Partition(splitting))
            partition = partitions[-1]
        partition.nodes.append(node)
        home[node] = partition
    return partitions


def _mark_outputs(partitions: list[_Partition], gm: GraphModule) -> None:
    """Find what each partition must return.

    A symbolic size is not returned: the tensor that it is read from is, and it is read again
    outside.
    """

    def leave(node: Node, partition: _Partition, inside: set[Node]) -> None:
        if _is_symbolic(node):
            for source in node.all_input_nodes:
                if source in inside:
                    leave(source, partition, inside)
        else:
            partition.outputs[node] = None

    for partition in partitions:
        inside = set(partition.nodes)
        for node in partition.nodes:
            if any(user not in inside for user in node.users):
                leave(node, partition, inside)


class _Stitcher:
    """Builds the stitching graph; lives for one split."""

    def __init__(self, gm: GraphModule, partitions: list[_Partition]) -> None:
        self._gm = gm
        self._partitions = partitions
        self._graph = Graph()
        self._root = torch.nn.Module()
        self._values: dict[Node, Node] = {}
        self._home = {node: index for index, p in enumerate(partitions) for node in p.nodes}

    def build(self) -> tuple[GraphModule, list[SplitItem]]:
        output = None
        done: set[int] = set()
        for node in self._gm.graph.nodes:
            if node.op == "placeholder":
                self._copy(node)
            elif node.op == "output":
                output = node
            elif node in self._home:
                index = self._home[node]
                if index not in done:
                    done.add(index)
                    self._call(index)
            elif node.op != "get_attr":
                self._copy(node)
        if output is None:
            raise SplitError("the graph has no output node; nothing can be built from it.")
        self._copy(output)
        drop_unused_sizes(self._graph)
        split = GraphModule(self._root, self._graph, class_name="Stitching")
        split.meta.update(self._gm.meta)
        items = [
            SplitItem(f"submod_{i}", i, p.splitting, submodule(split, f"submod_{i}"))
            for i, p in enumerate(self._partitions)
        ]
        return split, items

    def _copy(self, node: Node) -> Node:
        copied = self._graph.node_copy(node, self._value)
        self._values[node] = copied
        return copied

    def _value(self, node: Node) -> Node:
        """The stitching graph's node for one of the original graph."""
        if node not in self._values:
            if node.op == "get_attr":
                _copy_attribute(self._gm, self._root, str(node.target))
            elif not _is_symbolic(node):
                raise SplitError(f"node {node.name} is used before it is computed; the graph is not sorted.")
            self._copy(node)
        return self._values[node]

    def _call(self, index: int) -> None:
        """Build one submodule and call it."""
        partition = self._partitions[index]
        piece, inputs = _submodule(self._gm, partition)
        name = f"submod_{index}"
        self._root.add_module(name, piece)
        call = self._graph.call_module(name, tuple(self._value(node) for node in inputs))
        call.meta["val"] = tuple(node.meta.get("val") for node in partition.outputs)
        for position, node in enumerate(partition.outputs):
            taken = self._graph.create_node(
                "call_function", operator.getitem, (call, position), name=node.name
            )
            taken.meta = dict(node.meta)
            self._values[node] = taken


def _submodule(gm: GraphModule, partition: _Partition) -> tuple[GraphModule, list[Node]]:
    """One partition as a graph module, and the nodes that it takes as inputs."""
    root, graph = torch.nn.Module(), Graph()
    inside = set(partition.nodes)
    values: dict[Node, Node] = {}
    inputs = list(_inputs(partition, inside))
    for node in inputs:
        values[node] = graph.placeholder(node.name)
        values[node].meta = dict(node.meta)
    for node in partition.nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in values:
                _copy_attribute(gm, root, str(source.target))
                values[source] = graph.node_copy(source, values.__getitem__)
        if node.op == "call_module":
            _copy_attribute(gm, root, str(node.target))
        values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(tuple(values[node] for node in partition.outputs))
    return GraphModule(root, graph, class_name="Piece"), inputs


def _inputs(partition: _Partition, inside: set[Node]) -> Iterator[Node]:
    """Outside nodes in order of first use: the order that makes equal pieces look equal."""
    seen: set[Node] = set()
    for node in partition.nodes:
        for source in node.all_input_nodes:
            if source not in inside and source not in seen and source.op != "get_attr":
                seen.add(source)
                yield source


def _copy_attribute(gm: GraphModule, root: torch.nn.Module, path: str) -> None:
    """Make ``root.<path>`` what ``gm.<path>`` is, keeping parameters and buffers as such."""
    *parents, name = path.split(".")
    source, target = gm, root
    for part in parents:
        source = getattr(source, part)
        if not hasattr(target, part):
            target.add_module(part, torch.nn.Module())
        target = getattr(target, part)
    value = getattr(source, name)
    if isinstance(value, torch.nn.Module):
        target.add_module(name, value)
    elif isinstance(value, torch.Tensor) and name in source._buffers:
        target.register_buffer(name, value)
    else:
        setattr(target, name, value)
