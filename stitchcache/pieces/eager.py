"""Pieces that are not compiled: the graph as Python source, run op by op.

For machines without a compiler, for debugging, and for pieces that a compiler refuses.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import msgpack
import torch

from stitchcache.artifact.consts import dump_consts, load_consts
from stitchcache.errors import EntryFormatError
from stitchcache.pieces.base import BoxedPiece
from stitchcache.pieces.bodies import function_of, source_of

_MAGIC = "stitchcache eager piece 2"


class EagerBackend:
    """Stores generated code; loading it needs neither a compiler nor torch's."""

    name = "eager"
    parallel = True

    def require(self) -> None:
        """Nothing is needed."""

    def wants_warming(self) -> bool:
        """No."""
        return False

    def warm(self, devices: Collection[str], options: Mapping[str, Any], before: int) -> None:
        """Nothing to do."""

    def prepare(self, devices: Collection[str], options: Mapping[str, Any]) -> None:
        """Nothing to do."""

    def tuned(
        self, devices: Collection[str], options: Mapping[str, Any], before: int, pieces: int
    ) -> Mapping[str, Any]:
        """The same options for any number."""
        return options

    def settled(self, devices: Collection[str], options: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()

    def foreign_ops(self, piece: torch.fx.GraphModule) -> set[str]:
        """Every op can be called."""
        return set()

    def build(self, piece: torch.fx.GraphModule, directory: Path, options: Mapping[str, Any]) -> Path:
        """Write the piece's graph as source; see :class:`~stitchcache.pieces.base.Backend`."""
        path = directory / "piece.eager"
        record = {"magic": _MAGIC, **source_of(piece, dump_consts)}
        path.write_bytes(msgpack.packb(record))
        return path

    def load(self, path: Path, device: str) -> BoxedPiece:
        """Bind the stored source; see :class:`~stitchcache.pieces.base.Backend`."""
        function = function_of(_read(path), load_consts)

        def run(inputs: list[Any]) -> Any:
            return function(*inputs)

        return run


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
