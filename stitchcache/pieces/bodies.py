"""Graphs that a piece passes to higher-order ops, as functions of their own.

``torch.cond`` and its kin take graphs as arguments. A piece that is stored as source stores each of
them as source too, under the path of the attribute that holds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from stitchcache.codegen import compile_execution_fn, generate_execution_code
from stitchcache.graph.effects import called


class Body(torch.nn.Module):
    """Stands in a piece where a graph is passed to an op."""


def source_of(piece: GraphModule, dump: Any) -> dict[str, Any]:
    """Write a graph, and the graphs that it passes on, as plain data.

    Args:
        piece: The graph.
        dump: Serializes a list of constants.

    Returns:
        A record that :func:`function_of` reads.
    """
    graphs = dict(_bodies(piece))
    hollow = _without(piece, graphs)
    code, names, consts = generate_execution_code(hollow)
    plain = [name for name in names if name not in graphs]
    return {
        "code": code,
        "names": names,
        "consts": dump(consts),
        "attributes": {name: dump([_attribute(piece, name)]) for name in plain},
        "bodies": {name: source_of(graphs[name], dump) for name in names if name in graphs},
    }


def function_of(record: dict[str, Any], load: Any) -> Any:
    """Make the function that a record describes.

    Args:
        record: From :func:`source_of`.
        load: Reads a list of constants back.
    """
    bound = {name: load(stored)[0] for name, stored in record["attributes"].items()}
    bound.update({name: function_of(body, load) for name, body in record["bodies"].items()})
    return compile_execution_fn(record["code"], bound, record["names"], load(record["consts"]))


def _bodies(piece: GraphModule) -> Iterator[tuple[str, GraphModule]]:
    for node in piece.graph.nodes:
        if node.op == "get_attr":
            for body in called(node):
                yield str(node.target), body


def _without(piece: GraphModule, graphs: dict[str, GraphModule]) -> GraphModule:
    if not graphs:
        return piece
    graph = Graph()
    output, _ = graph.graph_copy(piece.graph, {}, return_output_node=True)  # type: ignore[misc]
    graph.output(output)
    root = torch.nn.Module()
    for node in graph.nodes:
        if node.op in {"get_attr", "call_module"}:
            name = str(node.target)
            _place(root, name, Body() if name in graphs else _attribute(piece, name))
    return GraphModule(root, graph)


def _place(root: torch.nn.Module, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for part in parents:
        if not hasattr(root, part):
            root.add_module(part, torch.nn.Module())
        root = getattr(root, part)
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        root.register_buffer(name, value)
    else:
        setattr(root, name, value)


def _attribute(piece: GraphModule, name: str) -> Any:
    owner, _, attribute = name.rpartition(".")
    return getattr(piece.get_submodule(owner), attribute)
