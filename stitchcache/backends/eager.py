"""Pieces that are not compiled: the graph as Python source, run op by op.

For machines without a compiler, for debugging, and for pieces that a compiler refuses.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import msgpack
import torch

from stitchcache.artifact.consts import dump_consts, load_consts
from stitchcache.backends.base import BoxedPiece
from stitchcache.codegen import compile_execution_fn, generate_execution_code
from stitchcache.errors import EntryFormatError

_MAGIC = "stitchcache eager piece 1"


class EagerBackend:
    """Stores generated code; loading it needs neither a compiler nor torch's."""

    name = "eager"
    parallel = True

    def require(self) -> None:
        """Nothing is needed."""

    def prepare(self, devices: Collection[str]) -> None:
        """Nothing to do."""

    def foreign_ops(self, piece: torch.fx.GraphModule) -> set[str]:
        """Every op can be called."""
        return set()

    def build(self, piece: torch.fx.GraphModule, directory: Path, options: Mapping[str, Any]) -> Path:
        """Write the piece's graph as source; see :class:`~stitchcache.backends.base.Backend`."""
        code, names, consts = generate_execution_code(piece)
        path = directory / "piece.eager"
        attributes = [_attribute(piece, name) for name in names]
        record = {
            "magic": _MAGIC,
            "code": code,
            "names": names,
            "consts": dump_consts(consts),
            "attributes": dump_consts(attributes),
        }
        path.write_bytes(msgpack.packb(record))
        return path

    def load(self, path: Path, device: str) -> BoxedPiece:
        """Bind the stored source; see :class:`~stitchcache.backends.base.Backend`."""
        record = _read(path)
        names = record["names"]
        attributes = load_consts(record["attributes"]) if names else []
        function = compile_execution_fn(
            record["code"],
            dict(zip(names, attributes, strict=True)),
            names,
            load_consts(record["consts"]),
        )

        def run(inputs: list[Any]) -> Any:
            return function(*inputs)

        return run


def _attribute(piece: torch.fx.GraphModule, name: str) -> Any:
    owner, _, attribute = name.rpartition(".")
    return getattr(piece.get_submodule(owner), attribute)


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
