"""Bytes to artifact, strictly: every key is required, typed and known, or the bytes are refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar, cast

from stitchcache.artifact import fields
from stitchcache.artifact.fields import FieldError, Fields, count, digest, each, expect, maybe, seconds, text
from stitchcache.artifact.frame import (
    HEADER_OFFSET,
    MAGIC,
    Kind,
    header_end,
    malformed,
    open_frame,
    open_header,
)
from stitchcache.artifact.header import Header as Header
from stitchcache.artifact.header import header_of as header_of
from stitchcache.artifact.record import Artifact, PieceRecord, Variant
from stitchcache.artifact.wire import unpack
from stitchcache.types import (
    BindingSpec,
    BlobRef,
    Factor,
    InputSpec,
    LeafSpec,
    OutputSpec,
    PieceRef,
    Scalar,
    Size,
    SizeRange,
    SourceRef,
    SymbolSpec,
    TargetRecord,
    TensorSpec,
)

T = TypeVar("T")

# Most headers fit: one small read for each entry that `ls` lists.
HEADER_READ = 4096


def decode(data: bytes, *, path: str = "") -> Artifact:
    """The artifact in an entry's bytes, of any format version up to the current.

    Args:
        data: A whole file.
        path: The file, for messages.

    Raises:
        EntryDamagedError: A size or digest is off.
        EntryFormatError: The bytes are no entry; ``field`` says where they go wrong.
        FutureFormatError: A newer stitchcache wrote them.
    """
    if is_legacy(data):
        # Imported when one is met: it needs modules that a warm start does not.
        from stitchcache.artifact.legacy import decode_legacy

        return decode_legacy(data, path=path)
    frame = open_frame(data, Kind.ENTRY, path=path)
    header = _decoded(_read_header, frame.header, path, "header")
    artifact = _decoded(lambda value: _read_artifact(value, header), frame.payload, path, "")
    if artifact.blobs != header.blobs or len(artifact.pieces) != header.piece_count:
        raise malformed(path, "header", "its counts or blobs are not those of the payload")
    return artifact


def is_legacy(data: bytes) -> bool:
    """Whether bytes look like an entry of format 0 to 2."""
    # A pickle of protocol 2 and up, or a msgpack map; neither is within one bit of the current magic.
    return data[:1] in (b"\x80", b"\x83", b"\x84", b"\x85") and data[: len(MAGIC)] != MAGIC


def decode_target(data: bytes, key: str, *, path: str = "") -> TargetRecord:
    """The record in a target file.

    Raises:
        EntryFormatError: It is damaged, malformed, newer, or of another key.
    """
    frame = open_frame(data, Kind.TARGET, path=path)
    return _decoded(lambda value: _read_target(value, key, frame.version), frame.payload, path, "")


def decode_piece(data: bytes, key: str, *, path: str = "") -> PieceRecord:
    """The record in a piece file.

    Raises:
        EntryFormatError: It is damaged, malformed, newer, or of another key.
    """
    frame = open_frame(data, Kind.PIECE, path=path)
    return _decoded(lambda value: _read_piece_record(value, key), frame.payload, path, "")


def decode_header(prefix: bytes, file_size: int, *, path: str = "") -> Header:
    """The header from an entry's first bytes; at least ``header_end(prefix)`` of them."""
    version, encoded = open_header(prefix, file_size, Kind.ENTRY, path=path)
    header = _decoded(_read_header, encoded, path, "header")
    return Header(
        graph_hash=header.graph_hash,
        label=header.label,
        created=header.created,
        compile_seconds=header.compile_seconds,
        format_version=version,
        variant_count=header.variant_count,
        piece_count=header.piece_count,
        backends=header.backends,
        blobs=header.blobs,
        path=path,
        file_bytes=file_size,
    )


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of an entry's file, by one small read.

    Raises:
        EntryFormatError: It is damaged, malformed or newer.
        OSError: It cannot be read.
    """
    name = os.fspath(path)
    with open(name, "rb") as file:
        prefix = file.read(HEADER_READ)
        size = os.fstat(file.fileno()).st_size
        if is_legacy(prefix):
            return header_of(decode(prefix + file.read(), path=name), path=name, file_bytes=size)
        if len(prefix) >= HEADER_OFFSET:
            missing = header_end(prefix, path=name) - len(prefix)
            prefix += file.read(missing) if missing > 0 else b""
    return decode_header(prefix, size, path=name)


def signed_bytes(data: bytes, *, path: str = "") -> tuple[bytes, bytes]:
    """What a signature is made over, and the signature block found (``b""`` where unsigned)."""
    frame = open_frame(data, Kind.ENTRY, path=path)
    # Sizes change when a signature is added, so it covers the parts and not the prelude.
    domain = b"stitchcache entry signature 1\0" + len(frame.header).to_bytes(8, "little")
    return domain + frame.header + frame.payload, frame.signature


def _decoded(read: Callable[[object], T], encoded: bytes, path: str, root: str) -> T:
    value = unpack(encoded, path=path, field=root or "payload")
    try:
        return read(value)
    except FieldError as error:
        where = error.within(root) if root else error
        raise malformed(path, where.field or "payload", where.reason) from None


def _read_header(value: object) -> Header:
    record = Fields(value)
    header = Header(
        graph_hash=record.take("graph_hash", digest),
        label=record.take("label", text),
        created=record.take("created", seconds),
        compile_seconds=record.take("compile_seconds", seconds),
        format_version=3,
        variant_count=record.take("variants", count),
        piece_count=record.take("pieces", count),
        backends=record.take("backends", each(text)),
        blobs=record.take("blobs", each(_read_blob)),
    )
    record.done()
    return header


def _read_artifact(value: object, header: Header) -> Artifact:
    record = Fields(value)
    artifact = Artifact(
        graph_hash=header.graph_hash,
        variants=record.take("variants", each(_read_variant)),
        input_spec=record.take("input_spec", maybe(_read_input_spec)),
        output_spec=record.take("output_spec", maybe(_read_output_spec)),
        bindings=record.take("bindings", each(_read_binding)),
        factors=record.take("factors", each(_read_factor)),
        created=header.created,
        label=header.label,
        compile_seconds=header.compile_seconds,
        format_version=header.format_version,
    )
    record.done()
    if not artifact.variants or len(artifact.variants) != header.variant_count:
        raise FieldError("variants", f"{len(artifact.variants)} where the header says {header.variant_count}")
    return artifact


def _read_variant(value: object) -> Variant:
    record = Fields(value)
    variant = Variant(
        size_range=record.take("size_range", maybe(_read_size_range)),
        code=record.take("code", text),
        submod_names=record.take("submod_names", each(text)),
        consts=record.take("consts", maybe(_binary)),
        pieces=record.take("pieces", each(_read_piece)),
    )
    record.done()
    return variant


def _read_size_range(value: object) -> SizeRange:
    record = Fields(value)
    low, high = record.take("min", count), record.take("max", count)
    if low > high:
        raise FieldError("max", f"{high} is below min {low}")
    size_range = SizeRange(low, high, record.take("dim", maybe(text)))
    record.done()
    return size_range


def _read_piece(value: object) -> PieceRef:
    record = Fields(value)
    piece = PieceRef(
        name=record.take("name", text),
        key=record.take("key", text),
        backend=record.take("backend", text),
        blob=record.take("blob", _read_blob),
    )
    record.done()
    return piece


def _read_blob(value: object) -> BlobRef:
    record = Fields(value)
    blob = BlobRef(digest=record.take("digest", digest), size=record.take("size", count))
    record.done()
    return blob


def _read_input_spec(value: object) -> InputSpec:
    record = Fields(value)
    spec = InputSpec(
        tree=record.take("tree", text),
        leaves=record.take("leaves", each(_read_leaf)),
        symbols=record.take("symbols", each(_read_symbol)),
        constraints=record.take("constraints", each(text)),
    )
    record.done()
    return spec


_leaf_kind = fields.one_of("tensor", "inout", "symbol", "constant")
_binding_kind = fields.one_of("parameter", "buffer", "constant")


def _read_leaf(value: object) -> LeafSpec:
    record = Fields(value)
    leaf = LeafSpec(
        path=record.take("path", text),
        kind=record.take("kind", _leaf_kind),  # type: ignore[arg-type]
        tensor=record.take("tensor", maybe(_read_tensor)),
        symbol=record.take("symbol", maybe(text)),
        value=record.take("value", _scalar),
    )
    record.done()
    needed = {"tensor": leaf.tensor, "inout": leaf.tensor, "symbol": leaf.symbol}
    if leaf.kind in needed and needed[leaf.kind] is None:
        raise FieldError(leaf.kind, f"missing where kind is {leaf.kind}")
    return leaf


def _scalar(value: object) -> Scalar:
    if type(value) is dict:
        record = Fields(value)
        number = record.take("int", text)
        record.done()
        try:
            return int(number, 16)
        except ValueError:
            raise FieldError("int", "not a hexadecimal number") from None
    if value is None or type(value) in (bool, int, float, str):
        return cast(Scalar, value)
    raise FieldError("", f"{type(value).__name__} where a scalar is expected")


def _read_symbol(value: object) -> SymbolSpec:
    record = Fields(value)
    symbol = SymbolSpec(
        name=record.take("name", text),
        min=record.take("min", _integer),
        max=record.take("max", maybe(_integer)),
        label=record.take("label", text),
    )
    record.done()
    return symbol


def _read_tensor(value: object) -> TensorSpec:
    record = Fields(value)
    tensor = TensorSpec(
        dtype=record.take("dtype", text),
        device=record.take("device", text),
        shape=record.take("shape", _read_sizes),
        stride=record.take("stride", _read_sizes),
    )
    record.done()
    if len(tensor.shape) != len(tensor.stride):
        raise FieldError("stride", f"{len(tensor.stride)} strides for {len(tensor.shape)} dimensions")
    return tensor


def _size(value: object) -> Size:
    return value if type(value) is str else count(value)


_read_sizes = each(_size)


def _read_output_spec(value: object) -> OutputSpec:
    record = Fields(value)
    spec = OutputSpec(
        tree=record.take("tree", text),
        count=record.take("count", count),
        mutations=record.take("mutations", each(text)),
    )
    record.done()
    return spec


def _read_binding(value: object) -> BindingSpec:
    record = Fields(value)
    binding = BindingSpec(
        name=record.take("name", text),
        kind=record.take("kind", _binding_kind),  # type: ignore[arg-type]
        tensor=record.take("tensor", _read_tensor),
        blob=record.take("blob", maybe(_read_blob)),
        aliases=record.take("aliases", each(text)),
    )
    record.done()
    return binding


def _read_factor(value: object) -> Factor:
    record = Fields(value)
    factor = Factor(
        name=record.take("name", text), value=record.take("value", text), digest=record.take("digest", text)
    )
    record.done()
    return factor


def _read_target(value: object, key: str, version: int) -> TargetRecord:
    record = Fields(value)
    _check_key(record.take("key", text), key)
    explained = version > 3
    target = TargetRecord(
        graph_hash=record.take("graph_hash", digest),
        sources=record.take("sources", each(_read_source)),
        globals=record.take("globals", each(_read_pair)),
        label=record.take("label", text),
        created=record.take("created", seconds),
        refused=record.take("refused", maybe(text)) if explained else None,
        factors=record.take("factors", _binary) if explained else b"",
    )
    record.done()
    return target


def _read_source(value: object) -> SourceRef:
    record = Fields(value)
    source = SourceRef(
        module=record.take("module", text),
        digest=record.take("digest", text),
        size=record.take("size", count),
    )
    record.done()
    return source


def _read_pair(value: object) -> tuple[str, str]:
    pair = each(text)(value)
    if len(pair) != 2:
        raise FieldError("", f"{len(pair)} items where 2 are expected")
    return pair[0], pair[1]


def _read_piece_record(value: object, key: str) -> PieceRecord:
    record = Fields(value)
    _check_key(record.take("key", text), key)
    piece = PieceRecord(key=key, backend=record.take("backend", text), blob=record.take("blob", _read_blob))
    record.done()
    return piece


def _check_key(found: str, key: str) -> None:
    if found != key:
        raise FieldError("key", f"{found} in a file that should be about {key}")


def _binary(value: object) -> bytes:
    return expect(value, bytes)


def _integer(value: object) -> int:
    return expect(value, int)
