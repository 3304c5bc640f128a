"""Entries, targets and pieces: bytes to records and back. The same record always gives the same bytes.

What each record holds and how it is checked stands in its declaration (``stitchcache.types``,
``stitchcache.artifact.record``); here stands which records a file consists of, in each version of the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stitchcache.artifact.frame import (
    MAGIC,
    Kind,
    header_end,
    malformed,
    open_frame,
    open_header,
    seal,
)
from stitchcache.artifact.record import Artifact, Header, PieceRecord, header_of
from stitchcache.artifact.schema import FieldError, fields_of, pack, plain, read_packed, reader, record
from stitchcache.records import fill
from stitchcache.types import BlobRef, Digest, Factor, TargetRecord

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass

CURRENT_SUFFIX = ".stitch"

MOST_RECORDS = 8
"""Records of a target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a target file holds: records for one target key, as several configurations may have the same key.

    Args:
        key: The target key; it is written too, so that a file under a wrong name is noticed.
        records: Newest first.
    """

    key: Digest
    records: tuple[TargetRecord, ...]

    def flaw(self) -> tuple[str, str] | None:
        """What is wrong with fields that were read."""
        number = len(self.records)
        return None if 0 < number <= MOST_RECORDS else ("records", f"{number} of them")


# -- what stands where ----------------------------------------------------------------------------

_NOT_STORED = ("format_version", "path", "file_bytes")
_HEADER = record(Header, skip=_NOT_STORED)
_ELSEWHERE = ("graph_hash", "label", "created", "compile_seconds", "format_version")
"""Fields of an artifact that the header has."""

_PAYLOAD = fields_of(Artifact, skip=_ELSEWHERE)
_PIECE = record(PieceRecord)
_FACTORS = reader("tuple[tuple[Name, str, Name], ...]")
_TARGET = record(Target)

# What older versions had not yet. Their readers are made when a file of theirs is met, as each costs a start.
_NOT_IN_ENTRY = {3: ("check",)}
_NOT_IN_TARGET = {3: ("refused", "factors", "code"), 4: ("code",), 5: ()}
"""Until version 5 a file was one record, with the key beside its fields."""


def encode(artifact: Artifact) -> bytes:
    """The bytes of an entry in the current format; ``created`` comes from it, no clock is read.

    Raises:
        EntryFormatError: A value has no form in the format.
    """
    header = plain(header_of(artifact), skip=_NOT_STORED)
    return seal(Kind.ENTRY, pack(header), pack(plain(artifact, skip=_ELSEWHERE)))


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
        return _decode_legacy(data, path)
    frame = open_frame(data, Kind.ENTRY, path=path)
    header = _header(frame.header, frame.version, path)

    def read(value: Any) -> Artifact:
        absent = _NOT_IN_ENTRY.get(frame.version)
        payload = fields_of(Artifact, skip=(*_ELSEWHERE, *absent)) if absent else _PAYLOAD
        values = {"check": None, **payload(value)}
        artifact = fill(Artifact, values | {name: getattr(header, name) for name in _ELSEWHERE})
        flaw = artifact.flaw()
        if flaw is not None:
            raise FieldError(*flaw)
        return artifact

    artifact: Artifact = read_packed(read, frame.payload, path)
    if header_of(artifact) != header:
        raise malformed(path, "header", "its counts, backends or blobs are not those of the payload")
    return artifact


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


def is_legacy(data: bytes) -> bool:
    """Whether bytes look like an entry of format 0 to 2."""
    # A pickle of protocol 2 and up, or a msgpack map; neither is within one bit of the current magic.
    return data[:1] in (b"\x80", b"\x83", b"\x84", b"\x85") and data[: len(MAGIC)] != MAGIC


def _decode_legacy(data: bytes, path: str) -> Artifact:
    # Imported when one is met: it needs modules that a warm start does not.
    from stitchcache.artifact.legacy import decode_legacy

    return decode_legacy(data, path=path)


# -- headers --------------------------------------------------------------------------------------


def decode_header(prefix: bytes, file_size: int, *, path: str = "") -> Header:
    """The header in an entry's first bytes, or in a whole legacy entry.

    Args:
        prefix: At least ``header_end(prefix)`` bytes; all of a legacy entry, which has no header.
        file_size: Length of the whole file.
        path: The file, for messages.
    """
    if is_legacy(prefix):
        return header_of(_decode_legacy(prefix, path), path=path, file_bytes=file_size)
    version, encoded = open_header(prefix, file_size, Kind.ENTRY, path=path)
    return _header(encoded, version, path, file_size)


def _header(encoded: bytes, version: int, path: str, file_size: int | None = None) -> Header:
    found: Header = read_packed(_HEADER, encoded, path, "header")
    place = {} if file_size is None else {"path": path, "file_bytes": file_size}
    return fill(Header, {**vars(found), "format_version": version, **place})


# -- targets and pieces ---------------------------------------------------------------------------


def encode_target(key: str, records: Sequence[TargetRecord]) -> bytes:
    """The bytes of a target file."""
    return seal(Kind.TARGET, b"", pack(plain(Target(key=key, records=tuple(records)))))


def decode_target(data: bytes, key: str, *, path: str = "") -> tuple[TargetRecord, ...]:
    """The records in a target file, newest first.

    Raises:
        EntryFormatError: It is damaged, malformed, newer, or of another key.
    """
    frame = open_frame(data, Kind.TARGET, path=path)

    def read(value: Any) -> tuple[TargetRecord, ...]:
        if frame.version not in _NOT_IN_TARGET:
            target: Target = _TARGET(value)
            _check_key(target.key, key)
            return target.records
        if type(value) is dict:
            _check_key(value.pop("key", None), key)
        return (record(TargetRecord, skip=_NOT_IN_TARGET[frame.version])(value),)

    found: tuple[TargetRecord, ...] = read_packed(read, frame.payload, path)
    return found


def encode_piece(piece: PieceRecord) -> bytes:
    """The bytes of a piece file."""
    return seal(Kind.PIECE, b"", pack(plain(piece)))


def decode_piece(data: bytes, key: str, *, path: str = "") -> PieceRecord:
    """The record in a piece file.

    Raises:
        EntryFormatError: It is damaged, malformed, newer, or of another key.
    """
    found: PieceRecord = read_packed(_PIECE, open_frame(data, Kind.PIECE, path=path).payload, path)
    if found.key != key:
        raise malformed(path, "key", f"{found.key} in a file that should be about {key}")
    return found


def _check_key(found: object, key: str) -> None:
    if found != key:
        raise FieldError("key", f"{found} in a file that should be about {key}")


# -- factors alone --------------------------------------------------------------------------------
# A target's factors are packed into one field of its record, so that a direct hit need not decode them:
# [[name, value, digest], ...] in msgpack, in the key's order.


def pack_factors(factors: Sequence[Factor]) -> bytes:
    """The bytes of ``TargetRecord.factors``.

    Raises:
        EntryFormatError: A value has no form in the format.
    """
    return pack([[factor.name, factor.value, factor.digest] for factor in factors])


def unpack_factors(data: bytes, *, path: str = "") -> tuple[Factor, ...]:
    """The factors in a record; none where none were recorded.

    Raises:
        EntryFormatError: The bytes are something else.
    """
    if not data:
        return ()
    rows: tuple[tuple[str, str, str], ...] = read_packed(_FACTORS, data, path, "factors")
    return tuple(Factor(name=name, value=value, digest=digest) for name, value, digest in rows)


# -- what the store's upkeep needs ----------------------------------------------------------------


class EntryCodec:
    """What files name; has what ``stitchcache.store.scan.Codec`` asks for."""

    def head_size(self, prefix: bytes, path: str) -> int:
        """Bytes that the header ends at."""
        return header_end(prefix, path=path)

    def head(self, prefix: bytes, file_size: int, path: str) -> Sequence[tuple[str, int]]:
        """Blobs that an entry names, from its header."""
        return _names(decode_header(prefix, file_size, path=path).blobs)

    def names(self, area: str, data: bytes, key: str, path: str) -> Sequence[tuple[str, int]]:
        """What a whole file names: blobs of an entry or a piece, graph hashes of a target."""
        if area == "targets":
            records = decode_target(data, key, path=path)
            return [(graph_hash, 0) for graph_hash in dict.fromkeys(each.graph_hash for each in records)]
        if area == "pieces":
            return _names([decode_piece(data, key, path=path).blob])
        return _names(decode_named(data, key, path).blobs)


def _names(blobs: Sequence[BlobRef]) -> list[tuple[str, int]]:
    return [(blob.digest, blob.size) for blob in blobs]
