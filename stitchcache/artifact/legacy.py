"""Formats 0, 1 and 2: entries written before the current format. They load for ever.

They lie flat in the cache's root and hold code and constants, no compiled pieces, and no digest of their own.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import TYPE_CHECKING, Any

from stitchcache.artifact.frame import malformed
from stitchcache.artifact.record import Artifact, Variant
from stitchcache.artifact.schema import FieldError, record, unpack
from stitchcache.types import Digest, Name

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass

MAX_SIZE = 256 << 20

# What a pickled dict of str, list and int needs; in particular nothing that finds or calls a global, and no
# LONG_BINPUT, whose index makes the C unpickler allocate whatever it says.
# fmt: off
_OPCODES = frozenset({
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "EMPTY_DICT", "EMPTY_LIST",
    "EMPTY_TUPLE", "DICT", "LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS",
    "SETITEM", "SETITEMS", "MEMOIZE", "BINPUT", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE",
    "BININT", "BININT1", "BININT2", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINFLOAT",
})
# fmt: on


def decode_legacy(data: bytes, *, path: str = "") -> Artifact:
    """The artifact in an entry of format 0, 1 or 2.

    Args:
        data: The whole file.
        path: The file, for messages.

    Raises:
        EntryFormatError: It is no such entry.
    """
    if len(data) > MAX_SIZE:
        raise malformed(path, "size", f"{len(data)} bytes are more than a legacy entry's {MAX_SIZE}")
    try:
        if data[:1] == b"\x80":
            return _format_0(_unpickle_plain(data))
        return _format_1_or_2(unpack(data, path=path, field="payload"))
    except FieldError as error:
        raise malformed(path, error.field or "payload", error.reason) from None


@dataclass(frozen=True, kw_only=True)
class _Format0:
    execution_code: str
    submod_names: tuple[Name, ...]
    graph_hash: Digest


@dataclass(frozen=True, kw_only=True)
class _Format2:
    version: int
    graph_hash: Digest
    code: str
    submod_names: tuple[Name, ...]
    consts: bytes | None = None


_FORMAT_0 = record(_Format0)
_FORMATS = {1: record(_Format2, skip=("consts",)), 2: record(_Format2)}


def _format_0(value: object) -> Artifact:
    found: _Format0 = _FORMAT_0(value)
    return _artifact(0, found.graph_hash, found.execution_code, found.submod_names, None)


def _format_1_or_2(value: object) -> Artifact:
    version = value.get("version") if type(value) is dict else None
    if type(version) is not int or version not in _FORMATS:
        raise FieldError("version", f"{version!r} is neither 1 nor 2")
    found: _Format2 = _FORMATS[version](value)
    return _artifact(version, found.graph_hash, found.code, found.submod_names, found.consts)


def _artifact(
    version: int, graph_hash: str, code: str, names: tuple[str, ...], consts: bytes | None
) -> Artifact:
    variant = Variant(size_range=None, code=code, submod_names=names, consts=consts, pieces=())
    return Artifact(graph_hash=graph_hash, variants=(variant,), format_version=version)


class _NoGlobals(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"global {module}.{name} in an entry that may have none")


def _unpickle_plain(data: bytes) -> object:
    end = 0
    try:
        for opcode, _argument, position in pickletools.genops(data):
            if opcode.name not in _OPCODES:
                raise FieldError(
                    "payload", f"opcode {opcode.name} at byte {position}; only plain data is read"
                )
            end = (position or 0) + 1
        if end != len(data):
            raise FieldError("payload", f"{len(data) - end} bytes after the end")
        return _NoGlobals(io.BytesIO(data)).load()
    except (
        pickle.UnpicklingError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        EOFError,
        AttributeError,
    ) as error:
        if isinstance(error, FieldError):
            raise
        raise FieldError("payload", f"not a plain pickle: {error or type(error).__name__}") from error
