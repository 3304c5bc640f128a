"""Entries, targets and pieces: bytes to records and back. The same record always gives the same bytes.

What each record holds and how it is checked stands in its declaration (``stitchcache.types``); here stands
which records a file consists of, in each version of the format.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from enum import IntEnum
from functools import partial
from typing import Any

from stitchcache.artifact import FieldError, pack, read_packed, read_value, reader, record
from stitchcache.errors import EntryDamagedError, EntryFormatError, FutureFormatError, UntrustedEntryError
from stitchcache.records import Digest, Length, Name, Seconds, dataclass
from stitchcache.types import ENTRY_VERSION, Artifact, BlobRef, Factor, TargetRecord, Variant

# -- the frame around every file: sizes and digests (docs/format.md has its grammar) ---------------
# No byte is decoded before its digest was checked, and no size believed before it was held against a cap and
# the length of the file.

MAGIC = b"STITCH\r\n"
# Magic, version, kind, sizes of header, payload and signature, zero.
PRELUDE = struct.Struct("<8sHHIQII")
DIGEST_SIZE = 32
HEADER_OFFSET = PRELUDE.size + DIGEST_SIZE

# Most bytes of each part, in the prelude's order; its last field is zero.
_MOST = {"header": 16 << 20, "payload": 1 << 30, "signature": 4096, "zero": 0}
OUTSIDE = b"outside\n"
"""Begins the signature of what was imported: whoever owns the file now, its signature has to be good."""


class Kind(IntEnum):
    """What a frame holds."""

    ENTRY = 1
    TARGET = 2
    PIECE = 3


FIRST_VERSION = 3
NEWEST = {Kind.ENTRY: ENTRY_VERSION, Kind.TARGET: 7, Kind.PIECE: 3}
"""The version that is written. The frame is the same in all of them; what lies in it has changed."""


def seal(kind: Kind, header: bytes, payload: bytes, signature: bytes = b"") -> bytes:
    """Put a frame around encoded bytes."""
    parts = {"header": header, "payload": payload, "signature": signature}
    for name, part in parts.items():
        if len(part) > _MOST[name]:
            most = f"the format's {_MOST[name]}; keep large tensors in blobs"
            raise EntryFormatError.at("", name, f"{len(part)} bytes are more than {most}")
    prelude = PRELUDE.pack(MAGIC, NEWEST[kind], kind, *map(len, parts.values()), 0)
    body = b"".join((prelude, hashlib.sha256(prelude + header).digest(), *parts.values()))
    return body + hashlib.sha256(body).digest()


def signature_in(data: bytes) -> bytes:
    """The signature in a file, empty where there is none; nothing of it, or of the file, is checked."""
    size: int = _prelude(data, "")[5] if len(data) > HEADER_OFFSET and data.startswith(MAGIC) else 0
    return data[-DIGEST_SIZE - size : -DIGEST_SIZE] if size else b""


def with_signature(data: bytes, kind: Kind, signature: bytes) -> bytes:
    """A file of the current version with another signature, or with none; all of it is checked.

    Raises:
        UntrustedEntryError: It is of an older version, which cannot be signed.
    """
    version, header, payload = open_frame(data, kind) if data.startswith(MAGIC) else (0, b"", b"")
    if version != NEWEST[kind]:
        said = f"format version {version} has no signatures: 'stitchcache sign' writes it anew"
        raise UntrustedEntryError(said, path="")
    return seal(kind, header, payload, signature)


def signed_digest(data: bytes, kind: Kind) -> str:
    """What a signature on a file is over: the digest that the file has without one."""
    return with_signature(data, kind, b"")[-DIGEST_SIZE:].hex()


def open_frame(data: bytes, kind: Kind, *, path: str = "") -> tuple[int, bytes, bytes]:
    """Format version, header and payload of a whole file; a digest covered every byte, and matched."""
    # The digest of the whole comes first: it stands at the same place in every version, so a flipped bit
    # in the version field is damage and not "a newer stitchcache".
    _prelude(data, path)
    if hashlib.sha256(memoryview(data)[:-DIGEST_SIZE]).digest() != data[-DIGEST_SIZE:]:
        raise EntryDamagedError.at(path, "digest", "the bytes do not match their sha256")
    version, header = open_header(data, len(data), kind, path=path)
    begin = HEADER_OFFSET + len(header)
    return version, header, data[begin : begin + _prelude(data, path)[4]]


def header_end(prefix: bytes, *, path: str = "") -> int:
    """Bytes that must be read for the header to be whole, from the first ``HEADER_OFFSET`` bytes or more."""
    return _end(_prelude(prefix, path)[3], path)


def _end(size: int, path: str) -> int:
    if size > _MOST["header"]:
        reason = f"{size} bytes are more than the format's {_MOST['header']}"
        raise EntryDamagedError.at(path, "header-size", reason)
    return HEADER_OFFSET + size


def open_header(prefix: bytes, file_size: int, kind: Kind, *, path: str = "") -> tuple[int, bytes]:
    """Format version and header from a file's first ``header_end(...)`` bytes or more."""
    _, version, found, *sizes = _prelude(prefix, path)
    # A newer version may have its header's digest elsewhere, so this is asked first. A kind that is not known
    # is a newer version's, if the version says so.
    newest = NEWEST.get(found, FIRST_VERSION)
    if version > newest:
        reason = f"format version {version} is newer than this stitchcache's {newest}"
        raise FutureFormatError.at(path, "version", reason, version=version)
    end = _end(sizes[0], path)
    if len(prefix) < end:
        raise EntryDamagedError.at(path, "header", "the file ends within the header")
    digest = hashlib.sha256(prefix[: PRELUDE.size] + prefix[HEADER_OFFSET:end]).digest()
    if digest != prefix[PRELUDE.size : HEADER_OFFSET]:
        raise EntryDamagedError.at(path, "header-digest", "the header does not match its sha256")
    if version < FIRST_VERSION:
        raise EntryFormatError.at(path, "version", f"{version} was never written in this layout")
    if found != kind:
        reason = f"{found} where {int(kind)} ({kind.name.lower()}) is expected"
        raise EntryFormatError.at(path, "kind", reason)
    for (part, most), size in zip(_MOST.items(), sizes, strict=True):
        if size > most:
            field = f"{part}-size" if most else part
            raise EntryFormatError.at(path, field, f"{size} is more than the format's {most}")
    total = HEADER_OFFSET + sum(sizes) + DIGEST_SIZE
    if total != file_size:
        reason = f"{file_size} bytes where the sizes inside add up to {total}"
        raise EntryDamagedError.at(path, "size", reason)
    return version, prefix[HEADER_OFFSET:end]


def _prelude(data: bytes, path: str) -> tuple[Any, ...]:
    if len(data) < HEADER_OFFSET:
        raise EntryDamagedError.at(path, "size", f"{len(data)} bytes are too few for a header")
    prelude = PRELUDE.unpack_from(data)
    if prelude[0] != MAGIC:
        raise EntryDamagedError.at(path, "magic", "the file does not begin as a stitchcache file does")
    return prelude


CURRENT_SUFFIX = ".stitch"
MOST_RECORDS = 8  # of a target


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What can be told of an entry from its first bytes."""

    graph_hash: Digest
    label: Name
    created: Seconds
    compile_seconds: Seconds
    variants: Length
    pieces: Length  # of all variants, repeated ones counted each time
    backends: tuple[Name, ...]  # of its pieces, sorted
    blobs: tuple[BlobRef, ...]  # distinct, in order of first use
    format_version: int = ENTRY_VERSION
    path: str = ""
    file_bytes: int = 0
    last_used: float = 0.0  # Unix time: when the file was written, or an hour or more later last read

    @property
    def blob_bytes(self) -> int:
        """Bytes of the distinct blobs."""
        return sum([blob.size for blob in self.blobs])


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceRecord:
    """What a piece key leads to."""

    key: Digest
    backend: Name
    blob: BlobRef


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """What a target file holds: records for one key, newest first; the key shows a wrong file name."""

    key: Digest
    records: tuple[TargetRecord, ...]
    # One a record, empty where it has none; none at all in version 6.
    signatures: tuple[bytes, ...] = ()

    def _flaw(self) -> tuple[str, str] | None:
        number = len(self.records)
        if not 0 < number <= MOST_RECORDS:
            return "records", f"{number} of them"
        found = len(self.signatures)
        return None if found in (0, number) else ("signatures", f"{found} for {number} records")


_NOT_IN_HEADER = ("format_version", "path", "file_bytes", "last_used")
_IN_HEADER = ("graph_hash", "label", "created", "compile_seconds", "format_version")
"""Fields of an artifact that stand in its header alone."""
_NOT_IN_TARGET = {3: ("refused", "factors", "code"), 4: ("code",), 5: ()}
"""What older versions had not yet. Until version 5 a file was one record, with the key beside its fields."""


def header_of(artifact: Artifact, **place: Any) -> Header:
    """The header that an artifact has or would have; ``place`` are the fields that tell of its file."""
    above = {name: getattr(artifact, name) for name in _IN_HEADER}
    # As floats, for equal artifacts are equal bytes.
    above |= {name: float(above[name]) for name in ("created", "compile_seconds")}
    return Header(
        variants=len(artifact.variants),
        pieces=len(artifact.pieces),
        backends=tuple(sorted({piece.backend for piece in artifact.pieces})),
        blobs=artifact.blobs,
        **above,
        **place,
    )


def encode(artifact: Artifact) -> bytes:
    """The bytes of an entry in the current format; as all that writes, it may raise ``EntryFormatError``."""
    header = pack(header_of(artifact), skip=_NOT_IN_HEADER)
    return seal(Kind.ENTRY, header, pack(artifact, skip=_IN_HEADER))


def decode(data: bytes, *, path: str = "") -> Artifact:
    """The artifact in a whole entry, of any format version up to the current.

    Raises:
        EntryDamagedError: A size or digest is off.
        EntryFormatError: The bytes are no entry; ``field`` says where they go wrong.
        FutureFormatError: A newer stitchcache wrote them.
    """
    if _is_legacy(data):
        return _decode_legacy(data, path)
    version, encoded, payload = open_frame(data, Kind.ENTRY, path=path)
    header = _header(encoded, version, path)
    read = record(Artifact, (*_IN_HEADER, "check") if version == 3 else _IN_HEADER)
    above = {name: getattr(header, name) for name in _IN_HEADER}
    artifact: Artifact = read_packed(partial(read, given=above), payload, path)
    if header_of(artifact) != header:
        reason = "its counts, backends or blobs are not those of the payload"
        raise EntryFormatError.at(path, "header", reason)
    return artifact


def decode_named(data: bytes, key: str, path: str) -> Artifact:
    """The artifact in a file, which must be of the graph hash that its name says, and of its kind."""
    # The name decides which format is tried, so that damage cannot turn one into another.
    artifact = decode(data, path=path) if path.endswith(CURRENT_SUFFIX) else _decode_legacy(data, path)
    _check_name("graph_hash", artifact.graph_hash, key, path)
    return artifact


def decode_factors(
    data: bytes, key: str, path: str, kinds: tuple[str, ...]
) -> tuple[str, tuple[Factor, ...]]:
    """An entry's label, and its factors whose names begin with one of ``kinds``.

    The rest is not checked, which is nine tenths of the work of :func:`decode`; else it raises the same.
    """
    if not data.startswith(MAGIC):
        artifact = decode_named(data, key, path)
        return artifact.label, artifact.factors
    version, encoded, payload = open_frame(data, Kind.ENTRY, path=path)
    header = _header(encoded, version, path)
    _check_name("graph_hash", header.graph_hash, key, path)

    def wanted(factor: Any) -> bool:
        name = factor.get("name") if type(factor) is dict else None
        # What is no factor stays, and is refused.
        return type(name) is not str or name.startswith(kinds)

    def read(value: Any) -> Any:
        every = value.get("factors") if type(value) is dict else None
        some = [*filter(wanted, every)] if type(every) is list else every
        return reader("tuple[Factor, ...]", globals())(some)

    return header.label, read_packed(read, payload, path, "factors")


def decode_header(prefix: bytes, file_size: int, *, path: str = "", last_used: float = 0.0) -> Header:
    """The header in an entry's first ``header_end(prefix)`` bytes; a legacy entry is read whole."""
    place: dict[str, Any] = {"path": path, "file_bytes": file_size, "last_used": last_used}
    if _is_legacy(prefix):
        return header_of(_decode_legacy(prefix, path), **place)
    version, encoded = open_header(prefix, file_size, Kind.ENTRY, path=path)
    return _header(encoded, version, path, **place)


def _header(encoded: bytes, version: int, where: str, **place: Any) -> Header:
    read = partial(record(Header, _NOT_IN_HEADER), given={"format_version": version, **place})
    found: Header = read_packed(read, encoded, where, "header")
    return found


# -- formats 0, 1 and 2: flat in the cache's root, code and constants alone, no digest. They load for ever.

MOST_LEGACY = 256 << 20


@dataclass(frozen=True, kw_only=True)
class _Legacy:
    """What they hold; 0 has ``execution_code`` in place of ``code`` and no version; consts came with 2."""

    graph_hash: Digest
    code: str
    submod_names: tuple[Name, ...]
    consts: bytes | None = None


def _is_legacy(data: bytes) -> bool:
    # A pickle of protocol 2 and up, or a msgpack map; neither is within one bit of the current magic.
    return data[:1] in (b"\x80", b"\x83", b"\x84", b"\x85") and data[: len(MAGIC)] != MAGIC


def _decode_legacy(data: bytes, path: str) -> Artifact:
    if len(data) > MOST_LEGACY:
        reason = f"{len(data)} bytes are more than a legacy entry's {MOST_LEGACY}"
        raise EntryFormatError.at(path, "size", reason)
    if data[:1] != b"\x80":
        return read_packed(_legacy, data, path)
    # Imported when one is met: a warm start does without.
    from stitchcache.artifact.unpickle import Refused, Unpickler

    try:
        value = Unpickler().load(data)
    except Refused as error:
        raise EntryFormatError.at(path, "payload", str(error)) from error
    if type(value) is dict and "execution_code" in value:
        value |= {"version": 0, "code": value.pop("execution_code")}
    return read_value(_legacy, value, path)


def _legacy(value: Any) -> Artifact:
    version = value.pop("version", None) if type(value) is dict else None
    if type(version) is not int or not 0 <= version <= 2:
        raise FieldError("version", f"{version!r} is none of 0, 1 and 2")
    found: _Legacy = record(_Legacy, () if version == 2 else ("consts",))(value)
    variant = Variant(
        size_range=None, code=found.code, submod_names=found.submod_names, consts=found.consts, pieces=()
    )
    return Artifact(graph_hash=found.graph_hash, variants=(variant,), format_version=version)


SignedRecords = tuple[tuple[TargetRecord, bytes], ...]
"""Records, each with its signature, which is empty where it has none."""


def encode_target(key: str, records: Sequence[TargetRecord], signatures: Sequence[bytes] = ()) -> bytes:
    """The bytes of a target file; signatures are one a record, or none."""
    signatures = tuple(signatures) or (b"",) * len(records)
    return seal(Kind.TARGET, b"", pack(_Target(key=key, records=tuple(records), signatures=signatures)))


def decode_signed(data: bytes, key: str, *, path: str = "") -> SignedRecords:
    """The records in a target file with their signatures, newest first; it must be of this key."""
    version, _, payload = open_frame(data, Kind.TARGET, path=path)

    def read(value: Any) -> SignedRecords:
        absent = _NOT_IN_TARGET.get(version)
        if absent is None:
            target: _Target = record(_Target, ("signatures",) if version == 6 else ())(value)
            _check_name("key", target.key, key, path)
            if version > 6 and not target.signatures:
                raise FieldError("signatures", "none")
            return tuple(zip(target.records, target.signatures or (b"",) * MOST_RECORDS, strict=False))
        if type(value) is dict:
            _check_name("key", value.pop("key", None), key, path)
        return ((record(TargetRecord, absent)(value), b""),)

    return read_packed(read, payload, path)


def decode_target(data: bytes, key: str, *, path: str = "") -> tuple[TargetRecord, ...]:
    """The records in a target file alone."""
    return tuple(found for found, _ in decode_signed(data, key, path=path))


def packed_digest(found: TargetRecord) -> str:
    """What a signature on a target record is over: the sha256 of its msgpack."""
    return hashlib.sha256(pack(found)).hexdigest()


def encode_piece(piece: PieceRecord) -> bytes:
    """The bytes of a piece file."""
    return seal(Kind.PIECE, b"", pack(piece))


def decode_piece(data: bytes, key: str, *, path: str = "") -> PieceRecord:
    """The record in a piece file, which must be of this key."""
    piece: PieceRecord = read_packed(record(PieceRecord), open_frame(data, Kind.PIECE, path=path)[2], path)
    _check_name("key", piece.key, key, path)
    return piece


def _check_name(field: str, found: object, key: str, path: str) -> None:
    if found != key:
        raise EntryFormatError.at(path, field, f"{found} in a file that should be about {key}")


def pack_factors(factors: Sequence[Factor]) -> bytes:
    """The bytes of ``TargetRecord.factors``: packed apart, so that a direct hit need not decode them."""
    return pack(tuple((factor.name, factor.value, factor.digest) for factor in factors))


def unpack_factors(data: bytes, *, path: str = "") -> tuple[Factor, ...]:
    """The factors in a record; none where none were recorded."""
    if not data:
        return ()
    rows = read_packed(reader("tuple[tuple[Name, str, Name], ...]"), data, path, "factors")
    return tuple(Factor(name=name, value=value, digest=digest) for name, value, digest in rows)
