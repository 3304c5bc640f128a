"""Split a graph at chosen ops into pieces: one submodule each, in the graph's own order.

``torch.fx.passes.split_module`` would not do (docs/design.md says why).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch.fx import Graph, GraphModule, Node

from stitchcache.errors import SplitError, SplittingOpNotFoundError
from stitchcache.graph.effects import attribute_of, attributes_of, matches, target_name
from stitchcache.graph.symbols import SYMBOLIC


@dataclass(frozen=True, slots=True)
class SplitItem:
    """One submodule of a split graph."""

    submod_name: str  # its name in the split graph, such as ``submod_0``
    graph_id: int  # its position
    is_splitting_graph: bool  # whether it holds splitting ops; those are never compiled
    graph: GraphModule  # always returns a tuple


def split_graph(
    gm: GraphModule, splitting_ops: Sequence[str], *, missing: Literal["error", "ignore"] = "error"
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
    counts = Counter(node.target for node in gm.graph.nodes if node.op == "call_function")
    for wanted in splitting_ops if missing == "error" else ():
        if not any(matches(target, wanted) for target in counts):
            present = [target_name(target) for target, _ in counts.most_common()]
            raise SplittingOpNotFoundError(
                f"splitting op {wanted!r} is not in the graph. Its most frequent ops are "
                f"{', '.join(present[:8])}. Take one of these, or leave the op out.",
                op=wanted,
                present=present,
            )
    partitions, home = _partitions(gm, splitting_ops)
    split = _stitch(gm, partitions, home)
    return split, [
        SplitItem(f"submod_{index}", index, partition.splitting, attribute_of(split, f"submod_{index}"))
        for index, partition in enumerate(partitions)
    ]


@dataclass(slots=True)
class _Partition:
    """Nodes that become one submodule, and those of them that others use."""

    splitting: bool
    nodes: dict[Node, None] = field(default_factory=dict)
    outputs: dict[Node, None] = field(default_factory=dict)

    def leave(self, node: Node) -> None:
        """Return a value; for a symbolic size the tensors that it is read from: it is read again outside."""
        if not _is_symbolic(node):
            self.outputs[node] = None
            return
        for source in node.all_input_nodes:
            if source in self.nodes:
                self.leave(source)


def drop_unused_sizes(graph: Graph) -> None:
    """Erase nodes that compute sizes which nothing uses."""
    for node in reversed(list(graph.nodes)):
        if _is_symbolic(node) and not node.users:
            graph.erase_node(node)


def _is_symbolic(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), SYMBOLIC)


def _partitions(gm: GraphModule, splitting_ops: Sequence[str]) -> tuple[list[_Partition], dict[Node, int]]:
    """Cut the node list where splitting ops begin and end; gives each node's partition by number too."""
    partitions: list[_Partition] = []
    home: dict[Node, int] = {}
    for node in gm.graph.nodes:
        inputs = node.all_input_nodes
        if node.op in {"placeholder", "output", "get_attr"}:
            continue
        if _is_symbolic(node) and not any(source in home for source in inputs):
            continue
        splitting = node.op == "call_function" and any(matches(node.target, op) for op in splitting_ops)
        # An item lies with the result that it is taken from.
        is_item = node.target is operator.getitem and len(inputs) == 1 and node.args[0] in home
        if not is_item and (not partitions or partitions[-1].splitting != splitting):
            partitions.append(_Partition(splitting))
        home[node] = home[node.args[0]] if is_item else len(partitions) - 1
        partitions[home[node]].nodes[node] = None
    for partition in partitions:
        for node in partition.nodes:
            if any(user not in partition.nodes for user in node.users):
                partition.leave(node)
    return partitions, home


def _stitch(gm: GraphModule, partitions: Sequence[_Partition], home: Mapping[Node, int]) -> GraphModule:
    """Build the stitching graph, which calls the partitions."""
    graph = Graph()
    pieces: dict[str, GraphModule] = {}
    values: dict[Node, Node] = {}  # the stitching graph's node for one of the original graph

    def value(node: Node) -> Node:
        if node not in values:
            if node.op != "get_attr" and not _is_symbolic(node):
                raise SplitError(f"node {node.name} is used before it is computed; the graph is not sorted.")
            values[node] = graph.node_copy(node, value)
        return values[node]

    for node in gm.graph.nodes:
        if node not in home:
            if node.op != "get_attr":
                values[node] = graph.node_copy(node, value)
            continue
        name, partition = f"submod_{home[node]}", partitions[home[node]]
        if name in pieces:
            continue
        pieces[name], inputs = _submodule(gm, partition)
        call = graph.call_module(name, tuple(map(value, inputs)))
        call.meta["val"] = tuple(node.meta.get("val") for node in partition.outputs)
        for position, result in enumerate(partition.outputs):
            # An item of what an op in the piece returns is named after the op: ``unbind_0``.
            source = result.args[0] if result.target is operator.getitem else None
            label = f"{source.name}_{result.args[1]}" if isinstance(source, Node) else result.name
            taken = graph.create_node("call_function", operator.getitem, (call, position), name=label)
            taken.meta = dict(result.meta)
            values[result] = taken
    if not any(node.op == "output" for node in graph.nodes):
        raise SplitError("the graph has no output node; nothing can be built from it.")
    drop_unused_sizes(graph)
    split = GraphModule(attributes_of(gm, values) | pieces, graph, class_name="Stitching")
    split.meta.update(gm.meta)
    return split


def _submodule(gm: GraphModule, partition: _Partition) -> tuple[GraphModule, list[Node]]:
    """One partition as a graph module, and the nodes that it takes as inputs."""
    graph = Graph()
    values: dict[Node, Node] = {}
    # Outside nodes in order of first use: the order that makes equal pieces look equal.
    outside = [s for node in partition.nodes for s in node.all_input_nodes if s not in partition.nodes]
    inputs = [source for source in dict.fromkeys(outside) if source.op != "get_attr"]
    for node in inputs:
        values[node] = graph.placeholder(node.name)
        values[node].meta = dict(node.meta)
    for node in partition.nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in values:
                values[source] = graph.node_copy(source, values.__getitem__)
        values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(tuple(values[node] for node in partition.outputs))
    return GraphModule(attributes_of(gm, graph.nodes), graph, class_name="Piece"), inputs
