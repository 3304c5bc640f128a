"""The artifact: everything that a compiled model is, but its weights; and its header. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stitchcache.artifact.frame import ENTRY_VERSION
from stitchcache.types import (
    BindingSpec,
    BlobRef,
    CheckRecord,
    Digest,
    Factor,
    InputSpec,
    Length,
    Name,
    OutputSpec,
    PieceRef,
    Seconds,
    SizeRange,
)

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Execution code with its pieces, for one size range or for all sizes.

    Args:
        size_range: The sizes it is for; ``None`` is all.
        code: Python source of the stitching function.
        submod_names: Submodules in the order the code expects their callables.
        consts: Pickled consts table, or ``None`` where the code needs none.
        pieces: One for each name in ``submod_names`` that has a compiled piece.
    """

    size_range: SizeRange | None
    code: str
    submod_names: tuple[Name, ...]
    consts: bytes | None
    pieces: tuple[PieceRef, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A compiled model as one immutable record.

    Args:
        graph_hash: 64 hex digits that name it.
        variants: At least one; more with ``size_ranges``.
        input_spec: What a call must bring; ``None`` for entries made through the engine API.
        output_spec: How results are returned; ``None`` likewise.
        bindings: Tensors taken from the model, in the order the stitching function takes them.
        factors: Named parts of its keys.
        check: How its results compared with the model's own when it was compiled; ``None`` where nothing
            was noted.
        created: Unix seconds.
        label: The model's class or the target's name, for people.
        compile_seconds: What compiling it took.
        format_version: Version it was read from; new ones have the current.
    """

    graph_hash: Digest
    variants: tuple[Variant, ...]
    input_spec: InputSpec | None = None
    output_spec: OutputSpec | None = None
    bindings: tuple[BindingSpec, ...] = ()
    factors: tuple[Factor, ...] = ()
    check: CheckRecord | None = None
    created: Seconds = 0.0
    label: Name = ""
    compile_seconds: Seconds = 0.0
    format_version: int = ENTRY_VERSION

    def flaw(self) -> tuple[str, str] | None:
        """What is wrong with fields that were read."""
        return None if self.variants else ("variants", "none")

    @property
    def code(self) -> str:
        """Source of the first variant."""
        return self.variants[0].code

    @property
    def submod_names(self) -> tuple[str, ...]:
        """Submodule names of the first variant."""
        return self.variants[0].submod_names

    @property
    def consts(self) -> bytes | None:
        """Pickled consts table of the first variant."""
        return self.variants[0].consts

    @property
    def pieces(self) -> tuple[PieceRef, ...]:
        """Pieces of all variants."""
        return tuple(piece for variant in self.variants for piece in variant.pieces)

    @property
    def blobs(self) -> tuple[BlobRef, ...]:
        """Distinct blobs of pieces and constants, in order of first use."""
        refs = [piece.blob for piece in self.pieces]
        refs += [binding.blob for binding in self.bindings if binding.blob is not None]
        return tuple(dict.fromkeys(refs))


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceRecord:
    """What a piece key leads to.

    Args:
        key: Piece key.
        backend: Backend that made the blob.
        blob: The compiled piece.
    """

    key: Digest
    backend: Name
    blob: BlobRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What can be told of an entry from its first bytes.

    Args:
        graph_hash: Its name.
        label: The model's class or the target's name.
        created: Unix seconds.
        compile_seconds: What compiling it took.
        variants: Size ranges that have code of their own.
        pieces: Pieces of all variants, repeated ones counted each time.
        backends: Backends of its pieces, sorted.
        blobs: Distinct blobs, in order of first use.
        format_version: 0 to 4.
        path: The file.
        file_bytes: Length of the file.
    """

    graph_hash: Digest
    label: Name
    created: Seconds
    compile_seconds: Seconds
    variants: Length
    pieces: Length
    backends: tuple[Name, ...]
    blobs: tuple[BlobRef, ...]
    format_version: int = ENTRY_VERSION
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
    pieces = artifact.pieces
    return Header(
        graph_hash=artifact.graph_hash,
        label=artifact.label,
        # As floats, for equal artifacts are equal bytes.
        created=float(artifact.created),
        compile_seconds=float(artifact.compile_seconds),
        variants=len(artifact.variants),
        pieces=len(pieces),
        backends=tuple(sorted({piece.backend for piece in pieces})),
        blobs=artifact.blobs,
        format_version=artifact.format_version,
        path=path,
        file_bytes=file_bytes,
    )
