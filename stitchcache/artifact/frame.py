"""The frame around every file that stitchcache writes: sizes and digests. docs/format.md has its grammar.

No byte is decoded before its digest was checked, and no size believed before it was held against a cap and
the length of the file. What is wrong with a file is an ``EntryFormatError``: an ``EntryDamagedError`` if a
size or digest is off, a ``FutureFormatError`` if the file is sound and newer than this stitchcache.
"""

from __future__ import annotations

import hashlib
import struct
from enum import IntEnum
from typing import Any

from stitchcache.errors import EntryDamagedError, EntryFormatError, FutureFormatError
from stitchcache.types import ENTRY_VERSION

MAGIC = b"STITCH\r\n"
# Magic, version, kind, sizes of header, payload and reserved bytes (room for a signature), zero.
PRELUDE = struct.Struct("<8sHHIQII")
DIGEST_SIZE = 32
HEADER_OFFSET = PRELUDE.size + DIGEST_SIZE

MAX_HEADER = 16 << 20
MAX_PAYLOAD = 1 << 30
MAX_RESERVED = 4096


class Kind(IntEnum):
    """What a frame holds."""

    ENTRY = 1
    TARGET = 2
    PIECE = 3


FIRST_VERSION = 3
NEWEST = {Kind.ENTRY: ENTRY_VERSION, Kind.TARGET: 6, Kind.PIECE: 3}
"""The version that is written. The frame is the same in all of them; what lies in it has changed."""


def malformed(
    path: str, field: str, reason: str, kind: type[EntryFormatError] = EntryFormatError, **facts: Any
) -> EntryFormatError:
    """An error for bytes that are not what the format says."""
    message = f"{path or 'entry'}: {field}: {reason}{kind.advice}"
    return kind(message, path=path, field=field, reason=reason, **facts)


def _damaged(path: str, field: str, reason: str) -> EntryFormatError:
    return malformed(path, field, reason, EntryDamagedError)


def seal(kind: Kind, header: bytes, payload: bytes) -> bytes:
    """Put a frame around encoded bytes."""
    for name, part, cap in (("header", header, MAX_HEADER), ("payload", payload, MAX_PAYLOAD)):
        if len(part) > cap:
            reason = f"{len(part)} bytes are more than the format's {cap}; keep large tensors in blobs"
            raise malformed("", name, reason)
    prelude = PRELUDE.pack(MAGIC, NEWEST[kind], kind, len(header), len(payload), 0, 0)
    body = b"".join((prelude, hashlib.sha256(prelude + header).digest(), header, payload))
    return body + hashlib.sha256(body).digest()


def open_frame(data: bytes, kind: Kind, *, path: str = "") -> tuple[int, bytes, bytes]:
    """Format version, header and payload of a whole file; a digest covered every byte, and matched."""
    # The digest of the whole comes first: it stands at the same place in every version, so a flipped bit
    # in the version field is damage and not "a newer stitchcache".
    _prelude(data, path)
    if hashlib.sha256(memoryview(data)[:-DIGEST_SIZE]).digest() != data[-DIGEST_SIZE:]:
        raise _damaged(path, "digest", "the bytes do not match their sha256")
    version, header = open_header(data, len(data), kind, path=path)
    begin = HEADER_OFFSET + len(header)
    return version, header, data[begin : begin + _prelude(data, path)[4]]


def header_end(prefix: bytes, *, path: str = "") -> int:
    """Bytes that must be read for the header to be whole, from the first ``HEADER_OFFSET`` bytes or more."""
    size: int = _prelude(prefix, path)[3]
    if size > MAX_HEADER:
        raise _damaged(path, "header-size", f"{size} bytes are more than the format's {MAX_HEADER}")
    return HEADER_OFFSET + size


def open_header(prefix: bytes, file_size: int, kind: Kind, *, path: str = "") -> tuple[int, bytes]:
    """Format version and header from a file's first ``header_end(...)`` bytes or more."""
    _, version, found, header, payload, reserved, zero = _prelude(prefix, path)
    # A newer version may have its header's digest elsewhere, so this is asked first. A kind that is not known
    # is a newer version's, if the version says so.
    newest = NEWEST.get(found, FIRST_VERSION)
    if version > newest:
        reason = f"format version {version} is newer than this stitchcache's {newest}"
        raise malformed(path, "version", reason, FutureFormatError, version=version)
    end = header_end(prefix, path=path)
    if len(prefix) < end:
        raise _damaged(path, "header", "the file ends within the header")
    digest = hashlib.sha256(prefix[: PRELUDE.size] + prefix[HEADER_OFFSET:end]).digest()
    if digest != prefix[PRELUDE.size : HEADER_OFFSET]:
        raise _damaged(path, "header-digest", "the header does not match its sha256")
    if version < FIRST_VERSION:
        raise malformed(path, "version", f"{version} was never written in this layout")
    if found != kind:
        raise malformed(path, "kind", f"{found} where {int(kind)} ({kind.name.lower()}) is expected")
    for field, size, cap in (
        ("payload-size", payload, MAX_PAYLOAD),
        ("reserved-size", reserved, MAX_RESERVED),
        ("zero", zero, 0),
    ):
        if size > cap:
            raise malformed(path, field, f"{size} is more than the format's {cap}")
    total = HEADER_OFFSET + header + payload + reserved + DIGEST_SIZE
    if total != file_size:
        raise _damaged(path, "size", f"{file_size} bytes where the sizes inside add up to {total}")
    return version, prefix[HEADER_OFFSET:end]


def _prelude(data: bytes, path: str) -> tuple[Any, ...]:
    if len(data) < HEADER_OFFSET:
        raise _damaged(path, "size", f"{len(data)} bytes are too few for a header")
    prelude = PRELUDE.unpack_from(data)
    if prelude[0] != MAGIC:
        raise _damaged(path, "magic", "the file does not begin as a stitchcache file does")
    return prelude
