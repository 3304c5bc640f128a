"""Typed reading of decoded msgpack. An error's field path grows while it unwinds.

A reader takes a map apart through :func:`record`, which fails on a missing, mistyped or unknown key, so that
what reaches a record is exactly what the format says. Every warm start reads hundreds of values this way, so
the common readers are written out instead of calling each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar, cast

T = TypeVar("T")

PLAIN: Callable[..., dict[str, Any]] = dict
"""For :func:`record`: a map that stays one."""

_HEX = frozenset("0123456789abcdef")


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


def is_digest(value: object) -> bool:
    """Whether a value is 64 lowercase hex digits."""
    return isinstance(value, str) and len(value) == 64 and _HEX.issuperset(value)


def expect(value: object, kind: type[T]) -> T:
    """A value of exactly this type (a bool is no int).

    Raises:
        FieldError: It has another type; the field is ``""``.
    """
    if type(value) is not kind:
        raise FieldError("", f"{_type_name(value)} where {kind.__name__} is expected")
    return value


def text(value: object) -> str:
    """A string."""
    if type(value) is not str:
        raise FieldError("", f"{_type_name(value)} where str is expected")
    return value


def digest(value: object) -> str:
    """A sha256 as 64 lowercase hex digits."""
    if not is_digest(value):
        raise FieldError("", f"{_shown(value)} is not 64 lowercase hex digits")
    return cast(str, value)


def count(value: object) -> int:
    """A whole number that is not negative."""
    if type(value) is not int:
        raise FieldError("", f"{_type_name(value)} where int is expected")
    if value < 0:
        raise FieldError("", f"{value} is negative")
    return value


def seconds(value: object) -> float:
    """A finite number of seconds."""
    number = float(value) if type(value) is int else expect(value, float)
    if not math.isfinite(number):
        raise FieldError("", f"{number} is not finite")
    return number


def one_of(*allowed: str) -> Callable[[object], str]:
    """A reader for one of a few words."""

    def read(value: object) -> str:
        if value not in allowed or type(value) is not str:
            raise FieldError("", f"{_shown(value)} is none of {', '.join(allowed)}")
        return value

    return read


def maybe(read: Callable[[object], T]) -> Callable[[object], T | None]:
    """A reader that also accepts nil."""

    def read_or_nil(value: object) -> T | None:
        return None if value is None else read(value)

    return read_or_nil


def each(read: Callable[[object], T]) -> Callable[[object], tuple[T, ...]]:
    """A reader for an array."""

    def read_all(value: object) -> tuple[T, ...]:
        items: list[T] = []
        try:
            for item in expect(value, list):
                items.append(read(item))  # noqa: PERF401  (their number says which one is wrong)
        except FieldError as error:
            raise (error.within(f"[{len(items)}]") if type(value) is list else error) from None
        return tuple(items)

    return read_all


def record(make: Callable[..., T], **readers: Callable[[object], Any]) -> Callable[[object], T]:
    """A reader for a map of exactly these keys: an unknown one might change the meaning of the others.

    Args:
        make: Gets what was read by keyword.
        **readers: A reader for each key.
    """
    keys = readers.keys()
    steps = tuple(readers.items())

    def read_record(value: object) -> T:
        found = expect(value, dict)
        if found.keys() != keys:
            raise _wrong_keys(found, keys)
        name = ""
        try:
            values = {}
            for name, read in steps:
                values[name] = read(found[name])
        except FieldError as error:
            raise error.within(name) from None
        return make(**values)

    return read_record


def _wrong_keys(found: Mapping[Any, Any], keys: Collection[str]) -> FieldError:
    missing = next((name for name in keys if name not in found), None)
    if missing is not None:
        return FieldError(missing, "missing")
    return FieldError(_shown(next(name for name in found if name not in keys)), "unknown key")


def _type_name(value: object) -> str:
    return "nil" if value is None else type(value).__name__


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
