"""The frame around every file that stitchcache writes: sizes and digests.

Grammar (docs/format.md is normative; integers are little-endian)::

    file      = prelude header-digest header payload reserved digest
    prelude   = magic version kind header-size payload-size reserved-size zero   ; 32 bytes
    magic     = "STITCH" CR LF                  ; 8 bytes; CR LF shows a text-mode transfer
    version   = u16                             ; of the kind: 4 in entries, 6 in targets, 3 in pieces
    kind      = u16                             ; 1 entry, 2 target, 3 piece
    header-digest = sha256(prelude header)      ; lets a reader trust the header without the rest
    digest    = sha256(everything before it)    ; the last 32 bytes, in every version from 3 on

Nothing in a frame is decoded before its digest has been checked, and no size is believed before it has
been held against a cap and against the length of the file.
"""

from __future__ import annotations

import hashlib
import struct
from enum import IntEnum
from typing import TYPE_CHECKING

from stitchcache.errors import EntryDamagedError, EntryFormatError, FutureFormatError

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass


MAGIC = b"STITCH\r\n"
PRELUDE = struct.Struct("<8sHHIQII")
DIGEST_SIZE = 32
HEADER_OFFSET = PRELUDE.size + DIGEST_SIZE
OVERHEAD = HEADER_OFFSET + DIGEST_SIZE

MAX_HEADER = 16 << 20
MAX_PAYLOAD = 1 << 30
MAX_RESERVED = 4096
MAX_FILE = OVERHEAD + MAX_HEADER + MAX_PAYLOAD + MAX_RESERVED


class Kind(IntEnum):
    """What a frame holds."""

    ENTRY = 1
    TARGET = 2
    PIECE = 3


FIRST_VERSION = 3
ENTRY_VERSION = 4
NEWEST = {Kind.ENTRY: ENTRY_VERSION, Kind.TARGET: 6, Kind.PIECE: 3}
"""The version that is written. The frame is the same in all of them; what lies in it has changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """An opened frame; every byte of it was covered by a digest that matched.

    Args:
        version: Format version it was written in.
        header: Encoded header; empty for targets and pieces.
        payload: Encoded payload.
    """

    version: int
    header: bytes
    payload: bytes


def seal(kind: Kind, header: bytes, payload: bytes) -> bytes:
    """Put a frame around encoded bytes.

    Raises:
        EntryFormatError: A part is larger than the format allows.
    """
    for name, part, cap in (("header", header, MAX_HEADER), ("payload", payload, MAX_PAYLOAD)):
        if len(part) > cap:
            raise EntryFormatError(
                f"{name} of {len(part)} bytes is larger than the format's {cap}; keep large tensors in blobs",
                field=name,
                reason="too large",
            )
    prelude = PRELUDE.pack(MAGIC, NEWEST[kind], kind, len(header), len(payload), 0, 0)
    header_digest = hashlib.sha256(prelude + header).digest()
    body = b"".join((prelude, header_digest, header, payload))
    return body + hashlib.sha256(body).digest()


def open_frame(data: bytes, kind: Kind, *, path: str = "") -> Frame:
    """Check a whole file's frame and take it apart.

    Args:
        data: The whole file.
        kind: What it must hold.
        path: The file, for messages.

    Raises:
        EntryDamagedError: A size or digest is off.
        EntryFormatError: It is not such a file.
        FutureFormatError: A newer stitchcache wrote it (and it is undamaged).
    """
    # The digest of the whole comes first: it stands at the same place in every version, so a flipped bit
    # in the version field is damage and not "a newer stitchcache".
    if len(data) < OVERHEAD:
        raise _damaged(path, "size", f"{len(data)} bytes are fewer than the {OVERHEAD} that every file has")
    if data[: len(MAGIC)] != MAGIC:
        raise _damaged(path, "magic", "the file does not begin as a stitchcache file does")
    if hashlib.sha256(memoryview(data)[:-DIGEST_SIZE]).digest() != data[-DIGEST_SIZE:]:
        raise _damaged(path, "digest", "the bytes do not match their sha256")
    version, header, payload = _read_prelude(data, len(data), kind, path)
    payload_begin = HEADER_OFFSET + header
    _check_header_digest(data, payload_begin, path)
    return Frame(
        version=version,
        header=data[HEADER_OFFSET:payload_begin],
        payload=data[payload_begin : payload_begin + payload],
    )


def header_end(prefix: bytes, *, path: str = "") -> int:
    """Bytes that must be read for the header to be whole.

    Args:
        prefix: At least the first ``HEADER_OFFSET`` bytes, or the whole file where that is shorter.
        path: The file, for messages.

    Raises:
        EntryDamagedError: It does not begin as a stitchcache file does, or the size is absurd.
    """
    if len(prefix) < HEADER_OFFSET:
        raise _damaged(path, "size", f"{len(prefix)} bytes are too few for a header")
    magic, _version, _kind, size, *_ = PRELUDE.unpack_from(prefix)
    if magic != MAGIC:
        raise _damaged(path, "magic", "the file does not begin as a stitchcache file does")
    if size > MAX_HEADER:
        raise _damaged(path, "header-size", f"{size} bytes are more than the format's {MAX_HEADER}")
    return HEADER_OFFSET + int(size)


def open_header(prefix: bytes, file_size: int, kind: Kind, *, path: str = "") -> tuple[int, bytes]:
    """Check and cut out the header alone, without the payload having been read.

    Args:
        prefix: The file's first ``header_end(...)`` bytes or more.
        file_size: Length of the whole file.
        kind: What it must hold.
        path: The file, for messages.

    Returns:
        The format version and the encoded header.
    """
    end = header_end(prefix, path=path)
    if len(prefix) < end:
        raise _damaged(path, "header", "the file ends within the header")
    # A newer version may have its header's digest elsewhere; what is newer is said before what is damaged.
    if PRELUDE.unpack_from(prefix)[1] <= NEWEST[kind]:
        _check_header_digest(prefix, end, path)
    version, *_ = _read_prelude(prefix, file_size, kind, path)
    return version, prefix[HEADER_OFFSET:end]


def _check_header_digest(data: bytes, end: int, path: str) -> None:
    digest = hashlib.sha256(data[: PRELUDE.size])
    digest.update(memoryview(data)[HEADER_OFFSET:end])
    if digest.digest() != data[PRELUDE.size : HEADER_OFFSET]:
        raise _damaged(path, "header-digest", "the header does not match its sha256")


def _read_prelude(data: bytes, file_size: int, kind: Kind, path: str) -> tuple[int, int, int]:
    """Version, header size and payload size, once all that the prelude says is possible."""
    _, version, found, header, payload, reserved, zero = PRELUDE.unpack_from(data)
    # A kind that is not known is a newer version's, if the version says so.
    newest = NEWEST.get(found, FIRST_VERSION)
    if version > newest:
        raise FutureFormatError(
            f"{path or 'entry'}: format version {version} is newer than this stitchcache's {newest}; "
            "the file is left alone: upgrade stitchcache, or use another cache directory",
            path=path,
            field="version",
            reason=f"format version {version}",
            version=version,
        )
    if version < FIRST_VERSION:
        raise malformed(path, "version", f"{version} was never written in this layout")
    if found != kind:
        raise malformed(path, "kind", f"{found} where {int(kind)} ({kind.name.lower()}) is expected")
    for field, size, cap in (
        ("header-size", header, MAX_HEADER),
        ("payload-size", payload, MAX_PAYLOAD),
        ("reserved-size", reserved, MAX_RESERVED),
        ("zero", zero, 0),
    ):
        if size > cap:
            raise malformed(path, field, f"{size} is more than the format's {cap}")
    total = OVERHEAD + header + payload + reserved
    if total != file_size:
        raise _damaged(path, "size", f"{file_size} bytes where the sizes inside add up to {total}")
    return version, header, payload


def _damaged(path: str, field: str, reason: str) -> EntryDamagedError:
    return EntryDamagedError(
        f"{path or 'entry'}: {field}: {reason}; it was truncated or changed, and will be rebuilt",
        path=path,
        field=field,
        reason=reason,
    )


def malformed(path: str, field: str, reason: str) -> EntryFormatError:
    """An error for bytes that are whole but are not what the format says."""
    return EntryFormatError(f"{path or 'entry'}: {field}: {reason}", path=path, field=field, reason=reason)
