"""A compiled graph as bytes that stand for themselves: entry, pieces, and tensors that the graph holds.

For ``torch.compile(...).aot_compile(...).save_compiled_function``. Such a file is native code that its reader
trusts, as every file of that kind is.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import torch

from stitchcache.artifact.consts import dump_consts, load_consts
from stitchcache.artifact.entry import CURRENT_SUFFIX, decode_named, encode
from stitchcache.artifact.record import Artifact
from stitchcache.errors import EntryDamagedError, EntryFormatError
from stitchcache.pieces import get_backend
from stitchcache.runtime.environment import check_environment, devices_in

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass

_MAGIC = "stitchcache torch.compile graph 1"
_WHERE = "a function saved by torch.compile(...).aot_compile"


@dataclass(frozen=True, slots=True)
class SavedGraph:
    """What a saved graph consists of.

    Args:
        artifact: Its entry.
        blobs: Digest to bytes, for each of the entry's blobs.
        held: Tensors that the graph holds itself, in order.
    """

    artifact: Artifact
    blobs: Mapping[str, bytes]
    held: Sequence[torch.Tensor]


def dump_graph(graph: SavedGraph) -> bytes:
    """Write a graph down.

    Raises:
        UnserializableConstError: A tensor cannot be stored.
    """
    record = {
        "magic": _MAGIC,
        "graph_hash": graph.artifact.graph_hash,
        "entry": encode(graph.artifact),
        "blobs": dict(graph.blobs),
        "held": dump_consts(list(graph.held)),
    }
    return bytes(msgpack.packb(record))


def load_graph(data: bytes) -> SavedGraph:
    """Read what :func:`dump_graph` wrote.

    Raises:
        EntryFormatError: The bytes are something else.
        EntryDamagedError: The entry or a piece is not what it was.
        BackendError: They were made for another machine or another torch.
    """
    try:
        record = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException) as error:
        raise _malformed("", str(error)) from error
    if not isinstance(record, dict) or record.get("magic") != _MAGIC:
        raise _malformed("magic", f"not {_MAGIC!r}")
    kinds = {"graph_hash": str, "entry": bytes, "blobs": dict, "held": (bytes, type(None))}
    for field, kind in kinds.items():
        if not isinstance(record.get(field), kind):  # type: ignore[arg-type]
            raise _malformed(field, "missing, or of another type")
    artifact = decode_named(record["entry"], record["graph_hash"], _WHERE + CURRENT_SUFFIX)
    check_environment(artifact, _WHERE)
    for blob in artifact.blobs:
        found = record["blobs"].get(blob.digest)
        if not isinstance(found, bytes) or hashlib.sha256(found).hexdigest() != blob.digest:
            raise EntryDamagedError(
                f"{_WHERE}: piece {blob.digest[:12]} is missing or damaged. Compile and save it again.",
                field=f"blobs[{blob.digest[:12]}]",
                reason="missing or damaged",
            )
    return SavedGraph(artifact, record["blobs"], load_consts(record["held"]))


def load_blobs(graph: SavedGraph) -> dict[str, Any]:
    """Load the pieces of a saved graph.

    Returns:
        Piece key to callable.

    Raises:
        BackendError: A piece cannot be loaded here.
    """
    device = next((device for device in devices_in(graph.artifact) if device != "cpu"), "cpu")
    pieces: dict[str, Any] = {}
    # A library that is mapped outlives its file.
    with tempfile.TemporaryDirectory(prefix="stitchcache-") as directory:
        for piece in graph.artifact.pieces:
            if piece.key not in pieces:
                path = Path(directory, piece.blob.digest)
                path.write_bytes(graph.blobs[piece.blob.digest])
                pieces[piece.key] = get_backend(piece.backend).load(path, device)
    return pieces


def _malformed(field: str, reason: str) -> EntryFormatError:
    where = f"{_WHERE}: {field}" if field else _WHERE
    return EntryFormatError(f"{where}: {reason}. Compile and save it again.", field=field, reason=reason)
