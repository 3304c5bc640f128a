"""How records stand in msgpack: what reads, checks and writes them comes from their declarations.

A record's fields are said once, in its class; their annotations name what each may be, by the names that
``stitchcache.types`` has. :func:`plain` writes a record; :func:`record` makes what reads one from its class.

Reading is strict: a key that is missing, unknown or of another kind is a :class:`FieldError`, whose path
grows while it unwinds. A warm start reads thousands of values. So everything is decided while the functions
are made, and the map that msgpack made becomes the record's own.
"""

from __future__ import annotations

import math
import operator
import re
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgpack

from stitchcache.artifact.frame import malformed
from stitchcache.records import defaults_of, fill, names_of
from stitchcache.types import is_digest

Reader = Callable[[Any], Any]
"""Checks a decoded value and makes of it what the record holds; raises :class:`FieldError`."""

_MOST_TEXT = 1 << 28
_MOST_NAME = 1 << 16
_MOST_EXPRESSION = 1 << 14
_MOST_ITEMS = 1 << 20
_MOST_COUNT = (1 << 63) - 1
_MOST_DIMENSIONS = 64
_MOST_SECONDS = 250e9
_MOST_HEX = 1 << 14

# The largest size has 19 digits. Arithmetic with a number of a million digits takes seconds.
_LONG_NUMBER = re.compile(r"\d{21}")
# msgpack has no larger integers; the rare larger constant is written as a map of one key.
_INT_MIN, _INT_MAX = -(1 << 63), (1 << 64) - 1
# Text may hold lone surrogates (file names, user data); they are kept as they are.
_SURROGATES = "surrogatepass"


class FieldError(ValueError):
    """A field is not what the format says.

    Args:
        field: Its path, such as ``variants[0].pieces[3].blob.digest``.
        reason: What is wrong.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason

    def within(self, outer: str) -> FieldError:
        """The same error, seen from the record around it."""
        joint = "" if not self.field or self.field.startswith("[") else "."
        return FieldError(f"{outer}{joint}{self.field}", self.reason)


# -- bytes and plain values -----------------------------------------------------------------------


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
    """Decode bytes whose digest has been checked: no extension types, no key twice, no numbers as keys.

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


def read_packed(read: Reader, data: bytes, path: str, root: str = "") -> Any:
    """What some bytes hold.

    Args:
        read: What they must be.
        data: msgpack, its digest checked.
        path: The file, for messages.
        root: What the field paths in messages begin with.

    Raises:
        EntryFormatError: They are something else; ``field`` says where.
    """
    value = unpack(data, path=path, field=root or "payload")
    try:
        return read(value)
    except FieldError as error:
        where = error.within(root) if root else error
        raise malformed(path, where.field or "payload", where.reason) from None


def plain(value: Any, *, skip: Collection[str] = ()) -> Any:
    """A value as msgpack has it; a record is a map of its fields, in their order.

    Args:
        value: A record, or what a record's field may hold.
        skip: Fields of the record that do not stand in the file.
    """
    kind = type(value)
    if kind is tuple:
        return [plain(item) for item in value]
    if kind is int and not _INT_MIN <= value <= _INT_MAX:
        return {"int": hex(value)}
    names = names_of(kind)
    if names is None:
        return value
    return {name: plain(getattr(value, name)) for name in names if name not in skip}


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a map has the same key twice")
    return found


def _no_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


# -- kinds of values ------------------------------------------------------------------------------


def _digest(value: object) -> object:
    if not is_digest(value):
        raise FieldError("", f"{_shown(value)} is not 64 lowercase hex digits")
    return value


def _text(most: int) -> Reader:
    def read(value: Any) -> Any:
        if type(value) is not str:
            raise _other(value, "str")
        if len(value) > most:
            raise FieldError("", f"text of {len(value)} characters where at most {most} are allowed")
        return value

    return read


def _expression(value: Any) -> Any:
    if type(value) is not str:
        raise _other(value, "str")
    if len(value) > _MOST_EXPRESSION or _LONG_NUMBER.search(value):
        raise FieldError("", f"{_shown(value)} is too long, or has a number that is")
    return value


def _bounded(least: int, most: int) -> Reader:
    def read(value: Any) -> Any:
        if type(value) is not int:
            raise _other(value, "int")
        if not least <= value <= most:
            raise FieldError(
                "", f"{value} is negative" if value < 0 else f"{value} is more than the format's {most}"
            )
        return value

    return read


def _size(value: Any) -> Any:
    # Written out: it is what a warm start reads most of.
    if type(value) is int and 0 <= value <= _MOST_COUNT:
        return value
    return _expression(value) if type(value) is str else _count(value)


def _float(least: float, most: float) -> Reader:
    def read(value: Any) -> Any:
        number = float(value) if type(value) is int else _float_itself(value)
        if not math.isfinite(number):
            raise FieldError("", f"{number} is not finite")
        if not least <= number <= most:
            raise FieldError("", f"{number} is not from {least} to {most}")
        return number

    return read


def _exactly(kind: type) -> Reader:
    def read(value: Any) -> Any:
        if type(value) is not kind:
            raise _other(value, kind.__name__)
        return value

    return read


def _scalar(value: Any) -> Any:
    if type(value) is dict:
        try:
            digits = _text(_MOST_HEX)(value["int"])
            if len(value) == 1:
                return int(digits, 16)
        except KeyError:
            pass
        except FieldError as error:
            raise error.within("int") from None
        except ValueError:
            raise FieldError("int", "not a hexadecimal number") from None
        raise _wrong_keys(value, ("int",))
    if value is None or type(value) in (bool, int, float):
        return value
    if type(value) is str:
        return _long_text(value)
    raise _other(value, "a scalar")


_count = _bounded(0, _MOST_COUNT)
_long_text = _text(_MOST_TEXT)
_float_itself = _exactly(float)

_READERS: Mapping[str, Reader] = {
    "str": _long_text,
    "bytes": _exactly(bytes),
    "int": _bounded(_INT_MIN, _INT_MAX),
    "Digest": _digest,
    "Name": _text(_MOST_NAME),
    "Expression": _expression,
    "Count": _count,
    "Length": _bounded(0, _MOST_ITEMS),
    "Seconds": _float(-_MOST_SECONDS, _MOST_SECONDS),
    "Amount": _float(0.0, sys.float_info.max),
    "Size": _size,
    "Scalar": _scalar,
}


# -- what is made of them -------------------------------------------------------------------------


def record(cls: type, *, skip: Collection[str] = ()) -> Reader:
    """Reads a map with exactly a record's fields as keys.

    Args:
        cls: The record's class.
        skip: Fields that do not stand in the file; they get their defaults.
    """
    read_fields, flaw = fields_of(cls, skip=skip), getattr(cls, "flaw", None)
    missing = {name: value for name, value in defaults_of(cls).items() if name in skip}

    def read(value: Any) -> Any:
        values = read_fields(value)
        if missing:
            values.update(missing)
        made: Any = fill(cls, values)
        if flaw is not None:
            found = flaw(made)
            if found is not None:
                raise FieldError(*found)
        return made

    return read


def fields_of(cls: type, *, skip: Collection[str] = ()) -> Reader:
    """The same, but what is read is a dict of the fields' values."""
    module = vars(sys.modules[cls.__module__])
    annotations: Mapping[str, str] = cls.__annotations__
    readers = {name: reader(text, module) for name, text in annotations.items() if name not in skip}
    steps, number = tuple(readers.items()), len(readers)

    def read(value: Any) -> Any:
        if type(value) is not dict:
            raise _other(value, "dict")
        # As many keys as fields, and every field found: so these are exactly the fields.
        if len(value) != number:
            raise _wrong_keys(value, readers)
        name = ""
        try:
            for name, read_one in steps:
                value[name] = read_one(value[name])
        except FieldError as error:
            raise error.within(name) from None
        except KeyError:
            raise _wrong_keys(value, readers) from None
        return value

    return read


def reader(text: str, module: Mapping[str, Any] | None = None) -> Reader:
    """What reads a value of an annotation.

    Args:
        text: The annotation's source.
        module: Where the names of records in it mean something.
    """
    if text in _READERS:
        return _READERS[text]
    if text == "Shape":
        return _array(_size, _MOST_DIMENSIONS)
    if text.endswith(" | None"):
        read = reader(text.removesuffix(" | None"), module)
        return lambda value: None if value is None else read(value)
    kind, _, inner = text.removesuffix("]").partition("[")
    if kind == "tuple" and inner.endswith(", ..."):
        return _array(reader(inner.removesuffix(", ..."), module), _MOST_ITEMS)
    if kind == "tuple":
        return _row([reader(each, module) for each in inner.split(", ")])
    if kind == "Literal":
        return _one_of(tuple(word.strip("\"'") for word in inner.split(", ")))
    return record((module or {})[text])


def _array(read: Reader, most: int) -> Reader:
    def read_all(value: Any) -> Any:
        if type(value) is not list:
            raise _other(value, "list")
        if len(value) > most:
            raise FieldError("", f"{len(value)} items where at most {most} are allowed")
        items = iter(value)
        try:
            return tuple(map(read, items))
        except FieldError as error:
            raise error.within(f"[{len(value) - 1 - operator.length_hint(items)}]") from None

    return read_all


def _row(readers: list[Reader]) -> Reader:
    """An array in which each place has a reader of its own."""

    def read(value: Any) -> Any:
        if type(value) is not list:
            raise _other(value, "list")
        if len(value) != len(readers):
            raise FieldError("", f"{len(value)} items where {len(readers)} are expected")
        items: list[Any] = []
        try:
            for read_one, item in zip(readers, value, strict=True):
                items.append(read_one(item))
        except FieldError as error:
            raise error.within(f"[{len(items)}]") from None
        return tuple(items)

    return read


def _one_of(allowed: tuple[str, ...]) -> Reader:
    def read(value: Any) -> Any:
        if type(value) is not str or value not in allowed:
            raise FieldError("", f"{_shown(value)} is none of {', '.join(allowed)}")
        return value

    return read


def _wrong_keys(found: Mapping[Any, Any], keys: Collection[str]) -> FieldError:
    missing = next((name for name in keys if name not in found), None)
    if missing is not None:
        return FieldError(missing, "missing")
    return FieldError(_shown(next(name for name in found if name not in keys)), "unknown key")


def _other(value: object, expected: str) -> FieldError:
    return FieldError("", f"{'nil' if value is None else type(value).__name__} where {expected} is expected")


def _shown(value: object) -> str:
    shown = repr(value[:100] if isinstance(value, (str, bytes)) else value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
