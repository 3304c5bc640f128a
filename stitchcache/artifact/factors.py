"""A target key's factors, packed into one field of its record, so that a direct hit need not decode them.

They are ``[[name, value, digest], ...]`` in msgpack, in the key's order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stitchcache.artifact.frame import Kind, malformed, open_frame
from stitchcache.artifact.wire import pack, unpack
from stitchcache.types import Factor

Raw = Mapping[str, tuple[str, str]]
"""Factor name to value and digest."""


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
    return factors_of(raw_factors(data, path=path))


def raw_factors(data: bytes, *, path: str = "") -> Raw:
    """The same without a record for each, for a look at many targets.

    Raises:
        EntryFormatError: The bytes are something else.
    """
    if not data:
        return {}
    found: dict[str, tuple[str, str]] = {}
    rows = unpack(data, path=path, field="factors")
    try:
        for name, value, digest in rows:
            if not (type(name) is type(value) is type(digest) is str):
                raise TypeError(name)
            found[name] = value, digest
    except (TypeError, ValueError) as error:
        raise malformed(path, "factors", "not an array of name, value and digest") from error
    return found


def raw_target(data: bytes, *, path: str = "") -> tuple[str, str, float, Raw]:
    """Graph hash, label, time and factors in a target file; the rest of it is not looked at.

    Raises:
        EntryFormatError: It is damaged or has none of these.
    """
    payload = unpack(open_frame(data, Kind.TARGET, path=path).payload, path=path, field="payload")
    try:
        facts = str(payload["graph_hash"]), str(payload["label"]), float(payload["created"])
        return *facts, raw_factors(payload.get("factors", b""), path=path)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise malformed(path, "payload", "not that of a target") from error


def raw_entry_factors(data: bytes, *, path: str = "") -> Raw:
    """The factors in an entry of the current format; the rest of it is not looked at.

    Raises:
        EntryFormatError: It is damaged or has none.
    """
    payload = unpack(open_frame(data, Kind.ENTRY, path=path).payload, path=path, field="payload")
    rows: Any = payload.get("factors") if type(payload) is dict else None
    try:
        return {str(row["name"]): (str(row["value"]), str(row["digest"])) for row in rows}
    except (TypeError, KeyError) as error:
        raise malformed(path, "factors", "not an array of factors") from error


def factors_of(raw: Raw) -> tuple[Factor, ...]:
    """A record for each."""
    return tuple(Factor(name=name, value=value, digest=digest) for name, (value, digest) in raw.items())
