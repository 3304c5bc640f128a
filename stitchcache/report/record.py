"""An entry as one JSON record: raw bytes, Unix seconds, full digests."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from stitchcache.artifact.record import Artifact, Variant
from stitchcache.report.pieces import piece_rows
from stitchcache.report.read import Entry
from stitchcache.types import PieceRef


def entry_record(entry: Entry) -> dict[str, Any]:
    """Everything that is known of an entry."""
    artifact = entry.artifact
    return {
        "graph_hash": artifact.graph_hash,
        "label": artifact.label,
        "created": artifact.created,
        "compile_seconds": artifact.compile_seconds,
        "format_version": artifact.format_version,
        "path": entry.path,
        "entry_bytes": entry.file_bytes,
        "blob_bytes": sum(blob.size for blob in artifact.blobs),
        "backends": sorted({piece.backend for piece in artifact.pieces}),
        "input": None if artifact.input_spec is None else asdict(artifact.input_spec),
        "output": None if artifact.output_spec is None else asdict(artifact.output_spec),
        "pieces": _pieces(artifact),
        "bindings": [asdict(binding) for binding in artifact.bindings],
        "factors": [asdict(factor) for factor in artifact.factors],
        "variants": [_variant(variant) for variant in artifact.variants],
    }


def _pieces(artifact: Artifact) -> list[dict[str, Any]]:
    return [
        {
            **_piece(row.piece),
            "size_range": None if row.size_range is None else asdict(row.size_range),
            "shared_by": row.shared,
        }
        for row in piece_rows(artifact)
    ]


def _piece(piece: PieceRef) -> dict[str, Any]:
    return {
        "name": piece.name,
        "key": piece.key,
        "backend": piece.backend,
        "blob": piece.blob.digest,
        "bytes": piece.blob.size,
    }


def _variant(variant: Variant) -> dict[str, Any]:
    return {
        "size_range": None if variant.size_range is None else asdict(variant.size_range),
        "code": variant.code,
        "submod_names": list(variant.submod_names),
        "consts_bytes": None if variant.consts is None else len(variant.consts),
    }
