"""What can be told of an entry from its first bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stitchcache.artifact.record import Artifact
from stitchcache.types import BlobRef

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What can be told of an entry from its first bytes.

    Args:
        graph_hash: Its name.
        label: The model's class or the target's name.
        created: Unix seconds.
        compile_seconds: What compiling it took.
        format_version: 0 to 3.
        variant_count: Size ranges that have code of their own.
        piece_count: Pieces of all variants, repeated ones counted each time.
        backends: Backends of its pieces, sorted.
        blobs: Distinct blobs, in order of first use.
        path: The file.
        file_bytes: Length of the file.
    """

    graph_hash: str
    label: str
    created: float
    compile_seconds: float
    format_version: int
    variant_count: int
    piece_count: int
    backends: tuple[str, ...]
    blobs: tuple[BlobRef, ...]
    path: str = ""
    file_bytes: int = 0

    @property
    def blob_count(self) -> int:
        """Distinct blobs."""
        return len(self.blobs)

    @property
    def blob_bytes(self) -> int:
        """Bytes of the distinct blobs."""
        return sum(blob.size for blob in self.blobs)


def header_of(artifact: Artifact, *, path: str = "", file_bytes: int = 0) -> Header:
    """The header that an artifact has or would have."""
    return Header(
        graph_hash=artifact.graph_hash,
        label=artifact.label,
        created=artifact.created,
        compile_seconds=artifact.compile_seconds,
        format_version=artifact.format_version,
        variant_count=len(artifact.variants),
        piece_count=len(artifact.pieces),
        backends=tuple(sorted({piece.backend for piece in artifact.pieces})),
        blobs=artifact.blobs,
        path=path,
        file_bytes=file_bytes,
    )
