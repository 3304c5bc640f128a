"""Artifacts and their bytes. No torch but in ``consts``.

Here is how records stand in msgpack: what reads, checks and writes them comes from their declarations.
Reading is strict: a key that is missing, unknown or of another kind is a :class:`FieldError`, whose path
grows while it unwinds. A warm start reads thousands of values. So everything is decided while the functions
are made, and the map that msgpack made becomes the record's own.
"""

from __future__ import annotations

import functools
import operator
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import msgpack

from stitchcache.errors import EntryFormatError, StitchCacheError
from stitchcache.records import fill
from stitchcache.types import is_digest

T = TypeVar("T")
Reader = Callable[[Any], Any]
"""Checks a decoded value and makes of it what the record holds; raises :class:`FieldError`."""

_MOST_ITEMS = 1 << 20
_MOST_COUNT = (1 << 63) - 1
# An empty array is a byte in a file and 64 in memory: items of longer files are counted, 2^20 in all.
_UNCOUNTED = 512 << 10

# The largest size has 19 digits. Arithmetic with a number of a million digits takes seconds.
_LONG_NUMBER = r"\d{21}"
# msgpack has no larger integers; the rare larger constant is written as a map of one key.
_INT_MIN, _INT_MAX = -(1 << 63), (1 << 64) - 1
# Text may hold lone surrogates (file names, user data); they are kept as they are.
_SURROGATES = "surrogatepass"


class FieldError(ValueError):
    """A field, such as ``variants[0].pieces[3].blob.digest``, is not what the format says."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason

    def within(self, outer: str) -> FieldError:
        """The same error, seen from the record around it."""
        joint = "" if not self.field or self.field.startswith("[") else "."
        return FieldError(f"{outer}{joint}{self.field}", self.reason)


MALFORMED = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
    SyntaxError, RecursionError, MemoryError, StopIteration,
)  # fmt: skip
"""What code raises that believes in the form of a record, and was given another. Fields are checked when
they are read; this is for what they mean together, and for text in them that has a grammar."""


@contextmanager
def well_formed(what: str) -> Iterator[None]:
    """The boundary to records from outside: what fails in the block because of their form is an
    ``EntryFormatError``.
    """
    try:
        yield
    except StitchCacheError:
        raise
    except MALFORMED as error:
        reason = f"stitchcache did not write this: {type(error).__name__}: {str(error)[:200]}"
        raise EntryFormatError(f"{what}: {reason}", field="payload", reason=reason) from error


def pack(value: Any, *, skip: Collection[str] = ()) -> bytes:
    """The msgpack of a record, without its fields in ``skip``, or of what a record's field may hold."""
    plain = _plain(value, skip)
    try:
        return bytes(msgpack.packb(plain, use_bin_type=True, strict_types=True, unicode_errors=_SURROGATES))
    except (TypeError, ValueError, OverflowError) as error:
        raise EntryFormatError.at("", "payload", f"cannot be encoded: {error}") from error


def _plain(value: Any, skip: Collection[str] = ()) -> Any:
    kind = type(value)
    if kind is tuple:
        return [_plain(item) for item in value]
    if kind is int and not _INT_MIN <= value <= _INT_MAX:
        return {"int": hex(value)}
    fields = getattr(kind, "__dataclass_fields__", None)
    if fields is None:
        return value
    return {name: _plain(getattr(value, name)) for name in fields if name not in skip}


def read_packed(read: Callable[[Any], T], data: bytes, path: str, root: str = "") -> T:
    """What msgpack holds; an ``EntryFormatError`` says where it is wrong, by a path that ``root`` begins."""
    # What unpackb makes of an extension type is taken by no reader.
    counted = _counter() if len(data) > _UNCOUNTED else None
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=unique if counted is None else lambda pairs: unique(counted(pairs)),
            list_hook=counted,
            max_array_len=min(len(data), _MOST_ITEMS),
            max_map_len=min(len(data), _MOST_ITEMS),
            unicode_errors=_SURROGATES,
        )
    except (ValueError, TypeError, RecursionError, MemoryError, msgpack.UnpackException) as error:
        reason = f"not valid msgpack: {error or type(error).__name__}"
        raise EntryFormatError.at(path, root or "payload", reason) from error
    return read_value(read, value, path, root)


def read_value(read: Callable[[Any], T], value: Any, path: str, root: str = "") -> T:
    """The same of what some bytes were decoded to."""
    try:
        return read(value)
    except FieldError as error:
        where = error.within(root) if root else error
        raise EntryFormatError.at(path, where.field or "payload", where.reason) from None


def _counter() -> Callable[[list[Any]], list[Any]]:
    left = _MOST_ITEMS

    def count(items: list[Any]) -> list[Any]:
        nonlocal left
        left -= 1 + len(items)
        if left < 0:
            raise ValueError(f"more than {_MOST_ITEMS} items in all")
        return items

    return count


def unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A map from outside; a ``ValueError`` where a key stands in it twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a map has the same key twice")
    return found


def _of(kind: type) -> Reader:
    def read(value: Any) -> Any:
        if type(value) is not kind:
            raise _other(value, kind.__name__)
        return value

    return read


def _text(most: int) -> Reader:
    def read(value: Any) -> Any:
        if type(value) is not str:
            raise _other(value, "str")
        if len(value) > most:
            raise FieldError("", f"text of {len(value)} characters where at most {most} are allowed")
        return value

    return read


def _number(kind: Any, least: float, most: float) -> Reader:
    def read(value: Any) -> Any:
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise _other(value, kind.__name__)
        if not least <= value <= most:
            raise FieldError("", f"{value} is not from {least} to {most}")
        return value

    return read


def _such(fits: Callable[[Any], bool], unfit: str) -> Reader:
    """A value that fits; ``unfit`` is what to say of others."""

    def read(value: Any) -> Any:
        if not fits(value):
            raise FieldError("", f"{_shown(value)} {unfit}")
        return value

    return read


def _expression(value: Any) -> Any:
    # Nearly all are a symbol's name: a warm start need not compile the pattern.
    if len(_short_text(value)) > 20 and re.search(_LONG_NUMBER, value):
        raise FieldError("", f"{_shown(value)} has a number that is too long")
    return value


def _size(value: Any) -> Any:
    # Written out: it is what a warm start reads most of.
    if type(value) is int and 0 <= value <= _MOST_COUNT:
        return value
    return _expression(value) if type(value) is str else _count(value)


def _hexadecimal(value: Any) -> int:
    digits = _hex_text(value)
    try:
        return int(digits, 16)
    except ValueError:
        raise FieldError("", "not a hexadecimal number") from None


def _scalar(value: Any) -> Any:
    if type(value) is dict:
        return _large_int(value)["int"]
    if type(value) is str:
        return _long_text(value)
    if value is not None and type(value) not in (bool, int, float):
        raise _other(value, "a scalar")
    return value


def _map(readers: Mapping[str, Reader]) -> Reader:
    """A map of exactly these keys, each with what reads its value."""
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


def _array(read: Reader, most: int) -> Reader:
    def read_all(value: Any) -> Any:
        if len(_list(value)) > most:
            raise FieldError("", f"{len(value)} items where at most {most} are allowed")
        items = iter(value)
        try:
            return tuple(map(read, items))
        except FieldError as error:
            raise error.within(f"[{len(value) - 1 - operator.length_hint(items)}]") from None

    return read_all


def _row(readers: list[Reader]) -> Reader:
    """An array in which each place has a reader of its own."""
    read_places = _map({f"[{place}]": read for place, read in enumerate(readers)})

    def read(value: Any) -> Any:
        places = {f"[{place}]": item for place, item in enumerate(_list(value))}
        return tuple(read_places(places).values())

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


_list = _of(list)
_count = _number(int, 0, _MOST_COUNT)
_long_text, _short_text, _hex_text = _text(1 << 28), _text(1 << 14), _text(1 << 14)
_large_int = _map({"int": _hexadecimal})

_READERS: Mapping[str, Reader] = {
    "str": _long_text,
    "bytes": _of(bytes),
    "int": _number(int, _INT_MIN, _INT_MAX),
    "Digest": _such(is_digest, "is not 64 lowercase hex digits"),
    "Name": _text(1 << 16),
    "Expression": _expression,
    "Count": _count,
    "Length": _number(int, 0, _MOST_ITEMS),
    "Seconds": _number(float, -250e9, 250e9),
    "Amount": _number(float, 0.0, sys.float_info.max),
    "Shape": _array(_size, 64),
    "Scalar": _scalar,
}


@functools.cache
def record(cls: type, skip: tuple[str, ...] = ()) -> Callable[..., Any]:
    """What reads a record; fields in ``skip`` are not in the file: they are given, or get their defaults."""
    module = vars(sys.modules[cls.__module__])
    fields: Mapping[str, Any] = getattr(cls, "__dataclass_fields__", {})
    read_fields = _map({name: reader(f.type, module) for name, f in fields.items() if name not in skip})
    absent = {name: fields[name].default for name in skip}
    flaw = getattr(cls, "_flaw", None)

    def read(value: Any, given: Mapping[str, Any] | None = None) -> Any:
        values = read_fields(value)
        values |= absent
        values |= given or {}
        made: Any = fill(cls, values)
        found = None if flaw is None else flaw(made)
        if found is not None:
            raise FieldError(*found)
        return made

    # Most records are parts of others, and there are many of them.
    return read if skip or flaw else lambda value: fill(cls, read_fields(value))


def reader(text: str, module: Mapping[str, Any] | None = None) -> Reader:
    """What reads a value of an annotation; ``module`` is where the names of records in it mean something."""
    if text in _READERS:
        return _READERS[text]
    if text.endswith(" | None"):
        read = reader(text.removesuffix(" | None"), module)
        return lambda value: None if value is None else read(value)
    kind, _, inner = text.removesuffix("]").partition("[")
    if kind == "tuple" and inner.endswith(", ..."):
        return _array(reader(inner.removesuffix(", ..."), module), _MOST_ITEMS)
    if kind == "tuple":
        return _row([reader(each, module) for each in inner.split(", ")])
    if kind == "Literal":
        words = tuple(word.strip("\"'") for word in inner.split(", "))
        return _such(words.__contains__, f"is none of {', '.join(words)}")
    return record((module or {})[text])
