"""How values of the standard library and of numpy are written."""

from __future__ import annotations

import collections
import contextvars
import datetime
import logging
import operator
import os
import pathlib
import random
import re
import sys
import types
import typing
import weakref
from collections.abc import Mapping
from typing import Any

from stitchcache.encoding import Handler, data_bytes
from stitchcache.keys.scope import KeyWriter

MAX_BYTES = 64 << 20
"""Largest tensor or array that is read for a key; reading more would cost longer than a trace saves."""


def refuse(why: str) -> Handler:
    """Write nothing: say what is the matter with values of a kind."""

    def put(writer: KeyWriter, value: Any) -> None:
        raise writer.error(f"a {type(value).__name__} {why}")

    return put


def _put_time(writer: KeyWriter, value: Any) -> None:
    """Write a date, time or duration by its fields."""
    kind = type(value)
    zone = getattr(value, "tzinfo", None)
    if kind is datetime.timedelta:
        fields: tuple[Any, ...] = (value.days, value.seconds, value.microseconds)
    elif kind is datetime.timezone:
        fields = (value.utcoffset(None), value.tzname(None))
    elif kind is datetime.date:
        fields = (value.isoformat(),)
    else:
        fields = (value.replace(tzinfo=None).isoformat(), value.fold)
    writer.head(b"time", 3)
    writer.text(kind.__name__)
    writer.put(fields)
    writer.put_at(".tzinfo", zone)


def _put_pattern(writer: KeyWriter, value: re.Pattern[Any]) -> None:
    writer.head(b"pattern", 2)
    writer.put(value.pattern)
    writer.put(value.flags)


def _put_path(writer: KeyWriter, value: pathlib.PurePath) -> None:
    if type(value).__module__.partition(".")[0] != "pathlib":
        raise writer.error(f"a {type(value).__name__}, which is a kind of path of its own; hold its text")
    writer.head(b"path", 2)
    writer.text(type(value).__name__)
    writer.text(str(value))


def _put_reduced(writer: KeyWriter, value: Any) -> None:
    writer.head(b"getter", 2)
    writer.text(type(value).__name__)
    writer.put_at("()", tuple(value.__reduce__()[1:]))


def _put_alias(writer: KeyWriter, value: Any) -> None:
    """Write ``list[int]``, ``Optional[int]`` and their kind."""
    writer.head(b"alias", 4)
    writer.text(type(value).__name__)
    origin = getattr(value, "__origin__", None)
    if isinstance(value, type(typing.List)):  # noqa: UP006
        writer.put(value.__name__)
    else:
        writer.put_at(".__origin__", origin)
    writer.put_at(".__args__", getattr(value, "__args__", ()))
    writer.put_at(".__metadata__", getattr(value, "__metadata__", ()))


def _put_type_variable(writer: KeyWriter, value: Any) -> None:
    if writer.again(value):
        return
    writer.head(b"type variable", 5)
    writer.text(type(value).__name__)
    writer.text(value.__name__)
    writer.put_at(".__bound__", value.__bound__)
    writer.put_at(".__constraints__", getattr(value, "__constraints__", ()))
    writer.put((bool(value.__covariant__), bool(value.__contravariant__)))


def _put_special_form(writer: KeyWriter, value: Any) -> None:
    writer.head(b"special form", 1)
    writer.text(value.__name__)


def _put_forward_reference(writer: KeyWriter, value: typing.ForwardRef) -> None:
    writer.head(b"forward reference", 1)
    writer.text(value.__forward_arg__)


def _put_logger(writer: KeyWriter, value: Any) -> None:
    # What loggers do changes no graph, and their state is the process's own.
    writer.head(b"logger", 0)


def _put_environment(writer: KeyWriter, value: Any) -> None:
    # Which variables are read from it is recorded when they are.
    writer.head(b"environment", 0)


def _put_weak(writer: KeyWriter, value: weakref.ref[Any]) -> None:
    target = value()
    known = writer.numbers.reference(target)
    if target is None or known is None:
        raise writer.error("a weak reference to an object that is not a part of the model")
    writer.head(b"weak reference", 1)
    writer.out += known


def _put_variable(writer: KeyWriter, item: contextvars.ContextVar[Any]) -> None:
    writer.head(b"context variable", 2)
    writer.text(item.name)
    # The variable stands for its value here and now; no value is told apart from any value.
    try:
        value: tuple[Any, ...] = (item.get(),)
    except LookupError:
        value = ()
    writer.put_at(".get()", value)


def _put_decimal(writer: KeyWriter, value: Any) -> None:
    writer.head(b"decimal", 1)
    writer.text(str(value))


_Sample = collections.namedtuple("_Sample", "field")
_ALIASES = (
    types.GenericAlias,
    types.UnionType,
    # Nothing public is the class of these.
    type(typing.List[int]),  # noqa: UP006
    type(typing.List),  # noqa: UP006
)
_TIMES = (datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone)

HANDLERS: Mapping[type, Handler] = {
    contextvars.ContextVar: _put_variable,
    type(_Sample.__dict__["field"]): _put_reduced,
    operator.itemgetter: _put_reduced,
    operator.attrgetter: _put_reduced,
    operator.methodcaller: _put_reduced,
    weakref.ReferenceType: _put_weak,
    typing.ForwardRef: _put_forward_reference,
    type(typing.Optional): _put_special_form,
    type(typing.Literal): _put_special_form,
    typing.TypeVar: _put_type_variable,
    typing.ParamSpec: _put_type_variable,
    **dict.fromkeys(_TIMES, _put_time),
}

FAMILIES: list[tuple[type, Handler]] = [
    (logging.Logger, _put_logger),
    (logging.LoggerAdapter, _put_logger),
    (type(os.environ), _put_environment),
    (weakref.ReferenceType, refuse("points to an object without keeping it")),
    (random.Random, refuse("gives other numbers each time")),
    (datetime.tzinfo, refuse("is a time zone with rules of its own")),
    (re.Pattern, _put_pattern),
    (pathlib.PurePath, _put_path),
    *((kind, _put_alias) for kind in _ALIASES),
]


def _put_array(writer: KeyWriter, value: Any) -> None:
    """Write a numpy array by value, with its order in memory."""
    numpy = sys.modules["numpy"]
    if value.dtype.hasobject:
        raise writer.error("a numpy array of objects")
    if value.nbytes > MAX_BYTES:
        raise writer.error(f"a numpy array of {value.size} elements; make it a buffer")
    if writer.again(value):
        return
    plain = value.view(numpy.ndarray)
    writer.head(b"array", 7)
    writer.put_class(type(value))
    _put_dtype(writer, value.dtype)
    writer.put(tuple(int(size) for size in plain.shape))
    writer.put(tuple(int(step) for step in plain.strides))
    writer.put(bool(plain.flags.writeable))
    writer.out += data_bytes(plain.tobytes())
    writer.put_state(value)
    if plain.size:
        low, high = numpy.lib.array_utils.byte_bounds(plain)
        writer.walk.spans.append((low, high, writer.numbers.place(value)))


def _put_number(writer: KeyWriter, value: Any) -> None:
    if value.dtype.hasobject:
        raise writer.error("a numpy scalar of objects")
    writer.head(b"numpy scalar", 3)
    writer.put_class(type(value))
    _put_dtype(writer, value.dtype)
    writer.out += data_bytes(value.tobytes())


def _put_dtype(writer: KeyWriter, value: Any) -> None:
    """Write a numpy data type."""
    writer.head(b"numpy dtype", 4)
    writer.text(value.str)
    try:
        writer.put_at(".descr", value.descr if value.fields else None)
    except ValueError as error:
        raise writer.error("a numpy data type with fields that overlap or are out of order") from error
    writer.put(bool(value.isalignedstruct))
    writer.put_at(".metadata", dict(value.metadata) if value.metadata else None)


def _put_universal(writer: KeyWriter, value: Any) -> None:
    """Write one of numpy's own functions by name."""
    numpy: Any = sys.modules["numpy"]
    own: Any = getattr(numpy, value.__name__, None)
    if own is not value:
        raise writer.error(f"the numpy function {value.__name__}, which is not numpy's own")
    writer.head(b"numpy function", 1)
    writer.text(value.__name__)


_DIFFUSERS_NOTES = frozenset({"_use_default_values", "_name_or_path", "_commit_hash", "_diffusers_version"})
"""What a configuration of diffusers says of its origin. The first is a list made from a set, in an order that
moves with the hash seed; only ``from_config`` reads it, to build another model."""


def _put_diffusers_config(writer: KeyWriter, value: Any) -> None:
    if writer.again(value):
        return
    items = collections.OrderedDict.items(value)
    pairs = [(name, item) for name, item in items if name not in _DIFFUSERS_NOTES]
    writer.head(b"diffusers config", 2 + 2 * len(pairs))
    writer.put_class(type(value))
    writer.put_pairs(pairs)
    writer.put_state(value, _DIFFUSERS_NOTES)


def late_families() -> list[tuple[type, Handler]]:
    """Types of modules that are imported only where values of theirs exist."""
    found: list[tuple[type, Handler]] = []
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        found += [
            (numpy.ndarray, _put_array),
            (numpy.generic, _put_number),
            (numpy.dtype, _put_dtype),
            (numpy.ufunc, _put_universal),
        ]
    diffusers = sys.modules.get("diffusers.configuration_utils")
    if diffusers is not None:
        found.append((diffusers.FrozenDict, _put_diffusers_config))
    decimal = sys.modules.get("decimal")
    if decimal is not None:
        found.append((decimal.Decimal, _exactly(decimal.Decimal, _put_decimal)))
    return found


def _exactly(kind: type, write: Handler) -> Handler:
    def put(writer: KeyWriter, value: Any) -> None:
        if type(value) is not kind:
            raise writer.error(f"a {type(value).__name__} has state that cannot be read")
        write(writer, value)

    return put
