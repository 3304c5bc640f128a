"""msgpack as the format uses it: no extension types, no duplicate keys, no numbers as keys."""

from __future__ import annotations

from typing import Any

import msgpack

from stitchcache.artifact.frame import malformed

# Strings may hold lone surrogates (file names, user data); they are kept as they are.
_SURROGATES = "surrogatepass"


def pack(value: Any) -> bytes:
    """Encode plain values.

    Raises:
        EntryFormatError: A value has no form in msgpack.
    """
    try:
        return bytes(msgpack.packb(value, use_bin_type=True, strict_types=True, unicode_errors=_SURROGATES))
    except (TypeError, ValueError, OverflowError) as error:
        raise malformed("", "payload", f"cannot be encoded: {error}") from error


def unpack(data: bytes, *, path: str, field: str) -> Any:
    """Decode bytes whose digest has been checked.

    Raises:
        EntryFormatError: They are not exactly one msgpack value of the format's kinds.
    """
    # unpackb caps every length at len(data), so a forged length allocates nothing.
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_unique,
            ext_hook=_no_extension,
            unicode_errors=_SURROGATES,
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise malformed(path, field, f"not valid msgpack: {error or type(error).__name__}") from error


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a map has the same key twice")
    return record


def _no_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}")
