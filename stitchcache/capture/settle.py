"""Take out of Dynamo's graphs what says nothing about values: modes, and wrappers around blocks.

Dynamo writes the modes that it passed through as calls. A graph that runs without autograd and autocast is
in none of them anyway. A checkpointed block is called as any other: there is nothing to compute again.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph, GraphModule, Node

from stitchcache.graph.effects import attribute_of
from stitchcache.torchside import dynamo

_INFERENCE = dynamo.INFERENCE_CALLS
_GRADIENT = _INFERENCE | dynamo.GRAD_CALLS


def settle_modes(gm: GraphModule, autocast: bool) -> tuple[GraphModule, bool]:
    """Take out calls that switch modes which the graph is not in when it runs.

    Args:
        gm: Dynamo's graph; not changed.
        autocast: Whether the caller's autocast is on.

    Returns:
        A copy, and whether it must be traced below autocast and the transforms of ``torch.func``, because a
        part of it is in one of them.
    """
    nodes = [node for graph in _graphs(gm) for node in graph.nodes]
    autocast = autocast or any(_name(node) == dynamo.ENTER_AUTOCAST and _enables(node) for node in nodes)
    transforms = any(dynamo.is_transform(node) for node in nodes)
    # A derivative is taken in gradient mode, also where results have no gradients.
    gone = (_INFERENCE if transforms else _GRADIENT) | (frozenset() if autocast else dynamo.AUTOCAST_CALLS)
    return _settled(gm, gone), autocast or transforms


def _settled(gm: GraphModule, gone: frozenset[str]) -> GraphModule:
    graph = Graph()
    output = graph.graph_copy(gm.graph, {}, return_output_node=True)
    if isinstance(output, tuple):
        graph.output(output[0])
    for node in reversed(list(graph.nodes)):
        if _name(node) in gone:
            graph.erase_node(node)
        elif _name(node) == dynamo.CHECKPOINT_CALL:
            _call_plainly(graph, node)
        elif _name(node) == dynamo.DATA_CALL:
            # Tracing does not see what comes of .data.
            node.op, node.target = "call_method", "detach"
    attributes = {}
    for node in graph.nodes:
        if node.op in {"get_attr", "call_module"}:
            value = attribute_of(gm, str(node.target))
            attributes[str(node.target)] = _settled(value, gone) if isinstance(value, GraphModule) else value
    settled = GraphModule(attributes, graph)
    settled.meta.update(gm.meta)
    return settled


def _call_plainly(graph: Graph, node: Node) -> None:
    """Have a checkpointed block called as any other."""
    body = node.args[0]
    if isinstance(body, Node) and body.op == "get_attr":
        node.op, node.target, node.args, node.kwargs = "call_module", str(body.target), node.args[1:], {}
        if not body.users:
            graph.erase_node(body)


def _graphs(gm: GraphModule) -> Iterator[Graph]:
    return (module.graph for module in gm.modules() if isinstance(module, GraphModule))


def _name(node: Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _enables(enter: Node) -> bool:
    """Whether an ``_enter_autocast(device, dtype, enabled, cache_enabled)`` switches autocast on."""
    enabled = enter.args[2] if len(enter.args) > 2 else enter.kwargs.get("enabled", True)
    return enabled is not False
