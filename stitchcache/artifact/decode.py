"""Bytes to artifact, strictly: every key is required, typed and known, or the bytes are refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

from stitchcache.artifact import fields
from stitchcache.artifact.fields import (
    PLAIN,
    FieldError,
    count,
    digest,
    each,
    expect,
    maybe,
    record,
    seconds,
    text,
)
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


# -- what the format says, from the inside out --------------------------------------------------------


def _binary(value: object) -> bytes:
    return expect(value, bytes)


def _integer(value: object) -> int:
    return expect(value, int)


def _size(value: object) -> Size:
    return value if type(value) is str else count(value)


def _size_range(min: int, max: int, dim: str | None) -> SizeRange:
    if min > max:
        raise FieldError("max", f"{max} is below min {min}")
    return SizeRange(min, max, dim)


def _tensor(shape: tuple[Size, ...], stride: tuple[Size, ...], **values: Any) -> TensorSpec:
    if len(shape) != len(stride):
        raise FieldError("stride", f"{len(stride)} strides for {len(shape)} dimensions")
    return TensorSpec(shape=shape, stride=stride, **values)


_read_long = record(PLAIN, int=text)


def _scalar(value: object) -> Scalar:
    if type(value) is dict:
        try:
            return int(_read_long(value)["int"], 16)
        except ValueError as error:
            if isinstance(error, FieldError):
                raise
            raise FieldError("int", "not a hexadecimal number") from None
    if value is None or type(value) in (bool, int, float, str):
        return cast(Scalar, value)
    raise FieldError("", f"{type(value).__name__} where a scalar is expected")


def _leaf(kind: Any, tensor: TensorSpec | None, symbol: str | None, **values: Any) -> LeafSpec:
    needed = {"tensor": tensor, "inout": tensor, "symbol": symbol}
    if kind in needed and needed[kind] is None:
        raise FieldError(kind, f"missing where kind is {kind}")
    return LeafSpec(kind=kind, tensor=tensor, symbol=symbol, **values)


def _pair(read: Callable[[object], T]) -> Callable[[object], tuple[str, T]]:
    def read_pair(value: object) -> tuple[str, T]:
        pair = expect(value, list)
        if len(pair) != 2:
            raise FieldError("", f"{len(pair)} items where 2 are expected")
        try:
            return text(pair[0]), read(pair[1])
        except FieldError as error:
            raise error.within("[0]" if type(pair[0]) is not str else "[1]") from None

    return read_pair


_read_sizes = each(_size)
_read_tensor = record(_tensor, dtype=text, device=text, shape=_read_sizes, stride=_read_sizes)
_read_blob = record(BlobRef, digest=digest, size=count)
_read_piece = record(PieceRef, name=text, key=text, backend=text, blob=_read_blob)
_read_size_range = record(_size_range, min=count, max=count, dim=maybe(text))
_read_variant = record(
    Variant,
    size_range=maybe(_read_size_range),
    code=text,
    submod_names=each(text),
    consts=maybe(_binary),
    pieces=each(_read_piece),
)
_read_leaf = record(
    _leaf,
    path=text,
    kind=fields.one_of("tensor", "inout", "symbol", "constant"),
    tensor=maybe(_read_tensor),
    symbol=maybe(text),
    value=_scalar,
)
_read_symbol = record(SymbolSpec, name=text, min=_integer, max=maybe(_integer), label=text)
_read_input_spec = record(
    InputSpec, tree=text, leaves=each(_read_leaf), symbols=each(_read_symbol), constraints=each(text)
)
_read_output_spec = record(OutputSpec, tree=text, count=count, mutations=each(text))
_read_binding = record(
    BindingSpec,
    name=text,
    kind=fields.one_of("parameter", "buffer", "constant"),
    tensor=_read_tensor,
    blob=maybe(_read_blob),
    aliases=each(text),
)
_read_factor = record(Factor, name=text, value=text, digest=text)
_read_source = record(SourceRef, module=text, digest=text, size=count)

_read_header_fields = record(
    PLAIN,
    graph_hash=digest,
    label=text,
    created=seconds,
    compile_seconds=seconds,
    variants=count,
    pieces=count,
    backends=each(text),
    blobs=each(_read_blob),
)
_read_payload = record(
    PLAIN,
    variants=each(_read_variant),
    input_spec=maybe(_read_input_spec),
    output_spec=maybe(_read_output_spec),
    bindings=each(_read_binding),
    factors=each(_read_factor),
)
_IN_TARGET_3: dict[str, Callable[[object], Any]] = {
    "key": text,
    "graph_hash": digest,
    "sources": each(_read_source),
    "globals": each(_pair(text)),
    "label": text,
    "created": seconds,
}
_IN_TARGET_4 = _IN_TARGET_3 | {"refused": maybe(text), "factors": _binary}
_IN_TARGET_5 = _IN_TARGET_4 | {"code": each(_pair(_binary))}
_TARGETS = {
    version: record(PLAIN, **keys)
    for version, keys in ((3, _IN_TARGET_3), (4, _IN_TARGET_4), (5, _IN_TARGET_5))
}
_read_piece_fields = record(PLAIN, key=text, backend=text, blob=_read_blob)


def _read_header(value: object) -> Header:
    found = _read_header_fields(value)
    return Header(
        format_version=3, variant_count=found.pop("variants"), piece_count=found.pop("pieces"), **found
    )


def _read_artifact(value: object, header: Header) -> Artifact:
    payload = _read_payload(value)
    variants = payload["variants"]
    if not variants or len(variants) != header.variant_count:
        raise FieldError("variants", f"{len(variants)} where the header says {header.variant_count}")
    return Artifact(
        graph_hash=header.graph_hash,
        created=header.created,
        label=header.label,
        compile_seconds=header.compile_seconds,
        format_version=header.format_version,
        **payload,
    )


def _read_target(value: object, key: str, version: int) -> TargetRecord:
    found = _TARGETS[version](value)
    _check_key(found.pop("key"), key)
    return TargetRecord(**found)


def _read_piece_record(value: object, key: str) -> PieceRecord:
    found = _read_piece_fields(value)
    _check_key(found["key"], key)
    return PieceRecord(**found)


def _check_key(found: str, key: str) -> None:
    if found != key:
        raise FieldError("key", f"{found} in a file that should be about {key}")
