"""Pieces that are not compiled: the graph as Python source, run op by op.

For machines without a compiler, for debugging, and for pieces that a compiler refuses. ``torch.cond`` and
its kin take graphs as arguments: each is stored as source too, under the path of the attribute that holds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
import torch
from torch.fx import Graph, GraphModule

from stitchcache.artifact.consts import dump_consts, load_consts
from stitchcache.codegen.execution import compile_execution_fn
from stitchcache.codegen.generate import generate_execution_code
from stitchcache.errors import EntryFormatError
from stitchcache.graph.effects import attribute_of, called
from stitchcache.pieces.backends import Backend, BoxedPiece

_MAGIC = "stitchcache eager piece 2"


class EagerBackend(Backend):
    """Stores generated code; loading it needs neither a compiler nor torch's."""

    name = "eager"

    def build(self, piece: GraphModule, directory: Path, options: Mapping[str, Any]) -> Path:
        """Write the piece's graph as source."""
        path = directory / "piece.eager"
        path.write_bytes(msgpack.packb({"magic": _MAGIC, **_source_of(piece)}))
        return path

    def load(self, path: Path, device: str) -> BoxedPiece:
        """Bind the stored source."""
        function = _function_of(_read(path))
        # It takes its inputs one by one, not as a list.
        return lambda inputs: function(*inputs)


def _read(path: Path) -> dict[str, Any]:
    try:
        record = msgpack.unpackb(path.read_bytes())
    except (ValueError, msgpack.UnpackException) as error:
        raise EntryFormatError(
            f"{path} is not an eager piece: {error}. Run 'stitchcache verify --repair'.",
            path=str(path),
            field="magic",
            reason=str(error),
        ) from error
    if not isinstance(record, dict) or record.get("magic") != _MAGIC:
        raise EntryFormatError(
            f"{path} is not an eager piece: wrong magic. Run 'stitchcache verify --repair'.",
            path=str(path),
            field="magic",
            reason="wrong magic",
        )
    return record


class _Body(torch.nn.Module):
    """Stands in a piece where a graph is passed to an op."""


def _source_of(piece: GraphModule) -> dict[str, Any]:
    """Write a graph, and the graphs that it passes on, as plain data."""
    graphs = dict(_bodies(piece))
    hollow = _without(piece, graphs)
    code, names, consts = generate_execution_code(hollow)
    plain = [name for name in names if name not in graphs]
    return {
        "code": code,
        "names": names,
        "consts": dump_consts(consts),
        "attributes": {name: dump_consts([attribute_of(piece, name)]) for name in plain},
        "bodies": {name: _source_of(graphs[name]) for name in names if name in graphs},
    }


def _function_of(record: dict[str, Any]) -> Any:
    """Make the function that a record of :func:`_source_of` describes."""
    bound = {name: load_consts(stored)[0] for name, stored in record["attributes"].items()}
    bound.update({name: _function_of(body) for name, body in record["bodies"].items()})
    return compile_execution_fn(record["code"], bound, record["names"], load_consts(record["consts"]))


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
            _place(root, name, _Body() if name in graphs else attribute_of(piece, name))
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
