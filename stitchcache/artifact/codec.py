"""The format as the store's upkeep needs it: what a file names, once its bytes are believed."""

from __future__ import annotations

from collections.abc import Sequence

from stitchcache.artifact.decode import decode, decode_header, decode_piece, decode_target
from stitchcache.artifact.frame import header_end, malformed
from stitchcache.artifact.header import Header, header_of
from stitchcache.artifact.record import Artifact
from stitchcache.types import BlobRef

CURRENT_SUFFIX = ".stitch"


def decode_named(data: bytes, key: str, path: str) -> Artifact:
    """The artifact in a file, which must be of the graph hash that its name says, and of its kind.

    Raises:
        EntryFormatError: It is damaged, malformed, newer, or another's.
    """
    # The name decides which format is tried, so that damage cannot turn one into another.
    artifact = decode(data, path=path) if path.endswith(CURRENT_SUFFIX) else _decode_legacy(data, path)
    if artifact.graph_hash != key:
        raise malformed(path, "graph_hash", f"{artifact.graph_hash} in a file that is named {key}")
    return artifact


def read_head(prefix: bytes, file_size: int, path: str) -> Header:
    """The header in an entry's first bytes, or in a whole legacy entry."""
    if path.endswith(CURRENT_SUFFIX):
        return decode_header(prefix, file_size, path=path)
    return header_of(_decode_legacy(prefix, path), path=path, file_bytes=file_size)


def _decode_legacy(data: bytes, path: str) -> Artifact:
    # Imported when one is met: it needs modules that a warm start does not.
    from stitchcache.artifact.legacy import decode_legacy

    return decode_legacy(data, path=path)


class EntryCodec:
    """The current format and those before it; has what ``stitchcache.store.reading.Codec`` asks for."""

    def head_size(self, prefix: bytes, path: str) -> int:
        """Bytes that the header ends at."""
        return header_end(prefix, path=path)

    def head(self, prefix: bytes, file_size: int, path: str) -> Sequence[tuple[str, int]]:
        """Blobs that an entry names, from its header."""
        return _names(read_head(prefix, file_size, path).blobs)

    def entry(self, data: bytes, key: str, path: str) -> Sequence[tuple[str, int]]:
        """Blobs that an entry names, all of it checked."""
        return _names(decode_named(data, key, path).blobs)

    def target(self, data: bytes, key: str, path: str) -> str:
        """Graph hash that a target leads to."""
        return decode_target(data, key, path=path).graph_hash

    def piece(self, data: bytes, key: str, path: str) -> tuple[str, int]:
        """Blob that a piece leads to."""
        blob = decode_piece(data, key, path=path).blob
        return blob.digest, blob.size


def _names(blobs: Sequence[BlobRef]) -> list[tuple[str, int]]:
    return [(blob.digest, blob.size) for blob in blobs]
