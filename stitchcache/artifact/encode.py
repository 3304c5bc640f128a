"""Artifact to bytes. The same artifact always gives the same bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from stitchcache.artifact.frame import Kind, seal
from stitchcache.artifact.record import Artifact, PieceRecord, Variant
from stitchcache.artifact.wire import pack
from stitchcache.types import (
    BindingSpec,
    BlobRef,
    InputSpec,
    LeafSpec,
    OutputSpec,
    PieceRef,
    Scalar,
    SizeRange,
    TargetRecord,
    TensorSpec,
)

# msgpack has no larger ones; the rare larger constant is written as a one-key map.
_INT_MIN, _INT_MAX = -(1 << 63), (1 << 64) - 1


def encode(artifact: Artifact, *, signature: bytes = b"") -> bytes:
    """The bytes of an entry in the current format.

    Args:
        artifact: What to write; ``created`` comes from it, no clock is read.
        signature: Signature block over what :func:`stitchcache.artifact.decode.signed_bytes` gives.

    Raises:
        EntryFormatError: A value has no form in the format.
    """
    return seal(Kind.ENTRY, pack(_header(artifact)), pack(_payload(artifact)), signature)


def encode_target(key: str, record: TargetRecord) -> bytes:
    """The bytes of a target file; ``key`` is written too, so that a file under a wrong name is noticed."""
    payload = {
        "key": key,
        "graph_hash": record.graph_hash,
        "sources": [
            {"module": source.module, "digest": source.digest, "size": source.size}
            for source in record.sources
        ],
        "globals": [[name, digest] for name, digest in record.globals],
        "label": record.label,
        "created": float(record.created),
        "refused": record.refused,
        "factors": record.factors,
        "code": [[name, marshalled] for name, marshalled in record.code],
    }
    return seal(Kind.TARGET, b"", pack(payload))


def encode_piece(record: PieceRecord) -> bytes:
    """The bytes of a piece file."""
    payload = {"key": record.key, "backend": record.backend, "blob": _blob(record.blob)}
    return seal(Kind.PIECE, b"", pack(payload))


def _header(artifact: Artifact) -> dict[str, Any]:
    pieces = artifact.pieces
    return {
        "graph_hash": artifact.graph_hash,
        "label": artifact.label,
        "created": float(artifact.created),
        "compile_seconds": float(artifact.compile_seconds),
        "variants": len(artifact.variants),
        "pieces": len(pieces),
        "backends": sorted({piece.backend for piece in pieces}),
        "blobs": [_blob(blob) for blob in artifact.blobs],
    }


def _payload(artifact: Artifact) -> dict[str, Any]:
    return {
        "variants": [_variant(variant) for variant in artifact.variants],
        "input_spec": None if artifact.input_spec is None else _input_spec(artifact.input_spec),
        "output_spec": None if artifact.output_spec is None else _output_spec(artifact.output_spec),
        "bindings": [_binding(binding) for binding in artifact.bindings],
        "factors": [
            {"name": factor.name, "value": factor.value, "digest": factor.digest}
            for factor in artifact.factors
        ],
    }


def _variant(variant: Variant) -> dict[str, Any]:
    return {
        "size_range": None if variant.size_range is None else _size_range(variant.size_range),
        "code": variant.code,
        "submod_names": _list(variant.submod_names),
        "consts": variant.consts,
        "pieces": [_piece(piece) for piece in variant.pieces],
    }


def _size_range(size_range: SizeRange) -> dict[str, Any]:
    return {"min": size_range.min, "max": size_range.max, "dim": size_range.dim}


def _piece(piece: PieceRef) -> dict[str, Any]:
    return {"name": piece.name, "key": piece.key, "backend": piece.backend, "blob": _blob(piece.blob)}


def _blob(blob: BlobRef) -> dict[str, Any]:
    return {"digest": blob.digest, "size": blob.size}


def _input_spec(spec: InputSpec) -> dict[str, Any]:
    return {
        "tree": spec.tree,
        "leaves": [_leaf(leaf) for leaf in spec.leaves],
        "symbols": [
            {"name": symbol.name, "min": symbol.min, "max": symbol.max, "label": symbol.label}
            for symbol in spec.symbols
        ],
        "constraints": _list(spec.constraints),
    }


def _leaf(leaf: LeafSpec) -> dict[str, Any]:
    return {
        "path": leaf.path,
        "kind": leaf.kind,
        "tensor": None if leaf.tensor is None else _tensor(leaf.tensor),
        "symbol": leaf.symbol,
        "value": _scalar(leaf.value),
    }


def _scalar(value: Scalar) -> Any:
    if type(value) is int and not _INT_MIN <= value <= _INT_MAX:
        return {"int": hex(value)}
    return value


def _tensor(tensor: TensorSpec) -> dict[str, Any]:
    return {
        "dtype": tensor.dtype,
        "device": tensor.device,
        "shape": _list(tensor.shape),
        "stride": _list(tensor.stride),
    }


def _output_spec(spec: OutputSpec) -> dict[str, Any]:
    return {"tree": spec.tree, "count": spec.count, "mutations": _list(spec.mutations)}


def _binding(binding: BindingSpec) -> dict[str, Any]:
    return {
        "name": binding.name,
        "kind": binding.kind,
        "tensor": _tensor(binding.tensor),
        "blob": None if binding.blob is None else _blob(binding.blob),
        "aliases": _list(binding.aliases),
    }


def _list(items: Iterable[Any]) -> list[Any]:
    return list(items)
