"""How containers and plain objects of the standard library and of numpy are written."""

from __future__ import annotations

import collections
import datetime
import enum
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
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from stitchcache.keys.values import SCALARS, Encoder, Handler


def _put_items(encoder: Encoder, items: Iterable[Any]) -> None:
    for index, item in enumerate(items):
        scalar = SCALARS.get(type(item))
        if scalar is not None:
            encoder.out += scalar(item)
        else:
            encoder.put_at(f"[{index}]", item)


def _items(value: Mapping[Any, Any]) -> Iterable[tuple[Any, Any]]:
    """The items as stored, not as a subclass would have them."""
    if isinstance(value, collections.OrderedDict):
        return collections.OrderedDict.items(value)
    return dict.items(value) if isinstance(value, dict) else value.items()


def put_tuple(encoder: Encoder, value: tuple[Any, ...]) -> None:
    """Write a tuple; no back reference, as equal tuples may or may not be one object."""
    encoder.out += b"(%d:" % len(value)
    _put_items(encoder, tuple.__iter__(value))


def put_list(encoder: Encoder, value: list[Any]) -> None:
    """Write a list."""
    if value and encoder.again(value):
        return
    encoder.out += b"[%d:" % len(value)
    _put_items(encoder, list.__iter__(value))


def put_dict(encoder: Encoder, value: Mapping[Any, Any]) -> None:
    """Write a dictionary in its own order."""
    if value and encoder.again(value):
        return
    encoder.out += b"<%d:" % len(value)
    for key, item in _items(value):
        scalar = SCALARS.get(type(key))
        if scalar is not None:
            encoder.out += scalar(key)
        else:
            encoder.put_at(" key", key)
        scalar = SCALARS.get(type(item))
        if scalar is not None:
            encoder.out += scalar(item)
        else:
            encoder.put_at(f"[{key!r}]" if isinstance(key, (str, int)) else "[...]", item)


def put_set(encoder: Encoder, value: frozenset[Any] | set[Any]) -> None:
    """Write a set, sorted by its elements' bytes; each element stands on its own."""
    parts = []
    for item in value:
        inner = encoder.fresh()
        inner.path.append(" element")
        inner.put(item)
        parts.append(bytes(inner.out))
    parts.sort()
    encoder.out += b"{%d:" % len(parts)
    encoder.out += b"".join(parts)


def _put_defaultdict(encoder: Encoder, value: collections.defaultdict[Any, Any]) -> None:
    encoder.out += b"q"
    encoder.put_at(".default_factory", value.default_factory)
    put_dict(encoder, value)


def _put_counted(encoder: Encoder, value: Any) -> None:
    encoder.text(type(value).__name__)
    put_list(encoder, list(value))


def _put_slice(encoder: Encoder, value: slice | range) -> None:
    encoder.out += b":" if isinstance(value, slice) else b"R"
    put_tuple(encoder, (value.start, value.stop, value.step))


def _put_bytearray(encoder: Encoder, value: bytearray) -> None:
    encoder.out += b"a"
    encoder.put(bytes(value))


def _put_text_form(encoder: Encoder, value: Any) -> None:
    encoder.out += b"x"
    encoder.text(type(value).__name__)
    encoder.text(str(value))


def _put_pattern(encoder: Encoder, value: re.Pattern[Any]) -> None:
    encoder.out += b"/"
    encoder.put(value.pattern)
    encoder.put(value.flags)


def _put_path(encoder: Encoder, value: pathlib.PurePath) -> None:
    encoder.out += b"h"
    encoder.text(str(value))


def member_state(member: enum.Enum) -> dict[str, Any]:
    """What was set on a member of an enumeration beside its name and value."""
    return {name: item for name, item in member.__dict__.items() if name not in _OF_EVERY_MEMBER}


def _put_enum(encoder: Encoder, value: enum.Enum) -> None:
    encoder.out += b"e"
    encoder.put_class(type(value))
    encoder.put(value.name)
    encoder.put(value.value)
    state = member_state(value)
    if state and not encoder.again(value):
        encoder.put_at(".__dict__", state)


def _put_reduced(encoder: Encoder, value: Any) -> None:
    encoder.out += b"z"
    reduced = value.__reduce__()
    encoder.put_class(type(value))
    encoder.put_at("()", tuple(reduced[1]))


def _put_typing(encoder: Encoder, value: Any) -> None:
    text = repr(value)
    if " at 0x" in text:
        raise encoder.error(f"a {type(value).__name__} whose text holds an address")
    encoder.out += b"t"
    encoder.text(text)


def _put_ignored(encoder: Encoder, value: Any) -> None:
    # Loggers and the like: what they do changes no graph, and their state is the process's own.
    encoder.out += b"-"


def _put_namespace(encoder: Encoder, value: types.SimpleNamespace) -> None:
    if not encoder.again(value):
        encoder.out += b"n"
        encoder.put_class(type(value))
        encoder.put_state(value)


def _put_sentinel(encoder: Encoder, value: object) -> None:
    # It has no state; all it can be asked is whether it is the same one, and back references say that.
    if not encoder.again(value):
        encoder.out += b"j"


def _put_sub(plain: type, write: Handler) -> Handler:
    """How to write an instance of a subclass of a builtin: class, payload, attributes."""

    def put(encoder: Encoder, value: Any) -> None:
        cls = type(value)
        encoder.out += b"u"
        encoder.put_class(cls)
        write(encoder, value)
        if getattr(value, "__dict__", None):
            encoder.put_state(value)

    return put


def _scalar(plain: type, exact: Callable[[Any], Any]) -> Handler:
    def put(encoder: Encoder, value: Any) -> None:
        # The builtin's own conversion, so that an overridden __str__ or __index__ is not asked.
        encoder.out += SCALARS[plain](exact(value))

    return put


def _unkeyable(why: str) -> Handler:
    def put(encoder: Encoder, value: Any) -> None:
        raise encoder.error(f"a {type(value).__name__} {why}")

    return put


def _put_tuple_getter(encoder: Encoder, value: Any) -> None:
    encoder.out += b"G"
    encoder.put(value.__reduce__()[1][0])


_OF_EVERY_MEMBER = frozenset({"_name_", "_value_", "__objclass__", "_sort_order_"})

_Sample = collections.namedtuple("_Sample", "field")

HANDLERS: Mapping[type, Handler] = {
    type(_Sample.__dict__["field"]): _put_tuple_getter,
    tuple: put_tuple,
    list: put_list,
    dict: put_dict,
    types.MappingProxyType: put_dict,
    set: put_set,
    frozenset: put_set,
    collections.OrderedDict: _put_sub(dict, put_dict),
    collections.defaultdict: _put_defaultdict,
    collections.deque: _put_counted,
    slice: _put_slice,
    range: _put_slice,
    bytearray: _put_bytearray,
    object: _put_sentinel,
    types.SimpleNamespace: _put_namespace,
    operator.itemgetter: _put_reduced,
    operator.attrgetter: _put_reduced,
    operator.methodcaller: _put_reduced,
    **dict.fromkeys(
        (
            datetime.datetime,
            datetime.date,
            datetime.time,
            datetime.timedelta,
        ),
        _put_text_form,
    ),
}

_LATE = (("decimal", "Decimal"), ("uuid", "UUID"))


def late_families() -> list[tuple[type, Handler]]:
    """Types of modules that are imported only where values of theirs exist."""
    modules = ((sys.modules.get(module), name) for module, name in _LATE)
    return [(kind, _put_exactly(kind)) for module, name in modules if (kind := getattr(module, name, None))]


def _put_exactly(kind: type) -> Handler:
    def put(encoder: Encoder, value: Any) -> None:
        if type(value) is kind:
            _put_text_form(encoder, value)
        else:
            encoder.put_object(value)

    return put


_TYPING = (
    types.GenericAlias,
    types.UnionType,
    typing.TypeVar,
    typing.ParamSpec,
    type(typing.List[int]),  # noqa: UP006 - the alias's own class is what is wanted
    type(typing.Optional[int]),  # noqa: UP045
    type(typing.Any),
    type(typing.Literal["a"]),
    typing.ForwardRef,
)

FAMILIES: list[tuple[type, Handler]] = [
    (logging.Logger, _put_ignored),
    (logging.LoggerAdapter, _put_ignored),
    # Which variables are read from it is recorded when they are.
    (type(os.environ), _put_ignored),
    (enum.Enum, _put_enum),
    (weakref.ReferenceType, _unkeyable("points to an object without keeping it")),
    (random.Random, _unkeyable("gives other numbers each time")),
    (re.Pattern, _put_pattern),
    (pathlib.PurePath, _put_path),
    *((kind, _put_typing) for kind in _TYPING if kind is not type),
    (str, _put_sub(str, _scalar(str, lambda value: str.__add__(value, "")))),
    (bytes, _put_sub(bytes, _scalar(bytes, lambda value: bytes.__add__(value, b"")))),
    (int, _put_sub(int, _scalar(int, int.__pos__))),
    (float, _put_sub(float, _scalar(float, float.__pos__))),
    (tuple, _put_sub(tuple, put_tuple)),
    (list, _put_sub(list, put_list)),
    (dict, _put_sub(dict, put_dict)),
    (set, _put_sub(set, put_set)),
    (frozenset, _put_sub(frozenset, put_set)),
]
