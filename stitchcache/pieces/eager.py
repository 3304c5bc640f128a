"""Pieces that are not compiled: the graph as Python source, run op by op.

For machines without a compiler, for debugging, and for pieces that a compiler refuses. ``torch.cond`` and
its kin take graphs as arguments: each is stored as source too, under the path of the attribute that holds it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgpack
from torch.fx import GraphModule

from stitchcache.artifact import read_packed, well_formed
from stitchcache.artifact.consts import dump_consts, load_consts
from stitchcache.codegen import compile_execution_fn
from stitchcache.codegen.generate import generate_execution_code
from stitchcache.errors import EntryFormatError
from stitchcache.graph.effects import attribute_of
from stitchcache.pieces import Backend, BoxedPiece, Options

_MAGIC = "stitchcache eager piece 2"


class EagerBackend(Backend):
    """Stores generated code; loading it needs neither a compiler nor torch's."""

    name = "eager"

    def compile(self, piece: GraphModule, directory: Path, options: Options) -> Path:
        """Write the piece's graph as source."""
        path = directory / "piece.eager"
        path.write_bytes(msgpack.packb({"magic": _MAGIC, **_source_of(piece)}))
        return path

    def load(self, path: Path, device: str) -> BoxedPiece:
        """Bind the stored source."""
        where = os.path.realpath(path)
        with well_formed(where):
            record: Any = read_packed(lambda value: value, path.read_bytes(), where, "eager piece")
            if not isinstance(record, dict) or record.get("magic") != _MAGIC:
                reason = "no eager piece: run 'stitchcache verify --repair'"
                raise EntryFormatError.at(where, "magic", reason)
            function = _function_of(record)
        # It takes its inputs one by one, not as a list.
        return lambda inputs: function(*inputs)


def _source_of(piece: GraphModule) -> dict[str, Any]:
    """Write a graph, and the graphs that it passes on, as plain data."""
    code, names, consts = generate_execution_code(piece)
    values = {name: attribute_of(piece, name) for name in names}
    graphs = {name: value for name, value in values.items() if isinstance(value, GraphModule)}
    return {
        "code": code,
        "names": names,
        "consts": dump_consts(consts),
        "attributes": {name: dump_consts([values[name]]) for name in names if name not in graphs},
        "bodies": {name: _source_of(graph) for name, graph in graphs.items()},
    }


def _function_of(record: Mapping[str, Any]) -> Callable[..., Any]:
    """Make the function that a record of :func:`_source_of` describes."""
    bound: dict[str, Any] = {name: load_consts(stored)[0] for name, stored in record["attributes"].items()}
    bound.update({name: _function_of(body) for name, body in record["bodies"].items()})
    return compile_execution_fn(record["code"], bound, record["names"], load_consts(record["consts"]))
