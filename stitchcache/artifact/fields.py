"""Typed reading of decoded msgpack. An error's field path grows while it unwinds.

A reader takes a map apart through :class:`Fields`, which fails on a missing, mistyped or unknown key, so
that what reaches a record is exactly what the format says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

T = TypeVar("T")

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
    return expect(value, str)


def digest(value: object) -> str:
    """A sha256 as 64 lowercase hex digits."""
    if not is_digest(value):
        raise FieldError("", f"{_shown(value)} is not 64 lowercase hex digits")
    return cast(str, value)


def count(value: object) -> int:
    """A whole number that is not negative."""
    number = expect(value, int)
    if number < 0:
        raise FieldError("", f"{number} is negative")
    return number


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
        items = []
        for index, item in enumerate(expect(value, list)):
            try:
                items.append(read(item))
            except FieldError as error:
                raise error.within(f"[{index}]") from None
        return tuple(items)

    return read_all


class Fields:
    """The keys of one map, each to be taken exactly once.

    Args:
        value: A decoded msgpack value.

    Raises:
        FieldError: It is no map.
    """

    __slots__ = ("_left",)

    def __init__(self, value: object) -> None:
        self._left: dict[str, Any] = dict(cast(Mapping[str, Any], expect(value, dict)))

    def take(self, name: str, read: Callable[[object], T]) -> T:
        """Read a required key.

        Raises:
            FieldError: It is missing or not what ``read`` expects.
        """
        try:
            value = self._left.pop(name)
        except KeyError:
            raise FieldError(name, "missing") from None
        try:
            return read(value)
        except FieldError as error:
            raise error.within(name) from None

    def done(self) -> None:
        """Check that no unknown key is left: it might change the meaning of the others.

        Raises:
            FieldError: One is.
        """
        if self._left:
            raise FieldError(_shown(next(iter(self._left))), "unknown key")


def _type_name(value: object) -> str:
    return "nil" if value is None else type(value).__name__


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
