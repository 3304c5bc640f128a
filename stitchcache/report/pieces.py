"""An entry's compiled pieces, call by call and by what they share."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from stitchcache.artifact.record import Artifact
from stitchcache.types import PieceRef, SizeRange


@dataclass(frozen=True, slots=True)
class PieceRow:
    """One call of a compiled piece.

    Args:
        piece: What is called.
        size_range: The sizes it is for; ``None`` is all.
        shared: Calls of the entry that run the same blob, this one included.
    """

    piece: PieceRef
    size_range: SizeRange | None
    shared: int


@dataclass(frozen=True, slots=True)
class DistinctPiece:
    """A compiled piece with the calls that run it.

    Args:
        piece: The first of them.
        names: Of all its calls, in order.
    """

    piece: PieceRef
    names: tuple[str, ...]


def piece_rows(artifact: Artifact) -> list[PieceRow]:
    """All calls, in order."""
    calls = Counter(piece.blob.digest for piece in artifact.pieces)
    return [
        PieceRow(piece, variant.size_range, calls[piece.blob.digest])
        for variant in artifact.variants
        for piece in variant.pieces
    ]


def distinct_pieces(artifact: Artifact) -> list[DistinctPiece]:
    """The different pieces, in order of first use."""
    names: dict[str, list[str]] = {}
    first: dict[str, PieceRef] = {}
    for piece in artifact.pieces:
        first.setdefault(piece.key, piece)
        names.setdefault(piece.key, []).append(piece.name)
    return [DistinctPiece(piece, tuple(names[key])) for key, piece in first.items()]


def names_text(names: tuple[str, ...], most: int = 3) -> str:
    """Names of calls, cut where there are many."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
