"""How Python's own values are written: containers, their subclasses, members of enumerations, code.

Imports no torch. The grammar stands in ``stitchcache.encoding``.
"""

from __future__ import annotations

import collections
import enum
import gc
from collections.abc import Callable, Mapping
from types import CodeType, MappingProxyType, SimpleNamespace
from typing import Any

from stitchcache.encoding import SCALARS, Handler, Writer, data_bytes, explained_size


def put_tuple(writer: Writer, value: tuple[Any, ...]) -> None:
    """Write a tuple; it has no number, as equal tuples may or may not be one object."""
    writer.head(b"tuple", tuple.__len__(value))
    writer.put_items(tuple.__iter__(value))


def put_list(writer: Writer, value: list[Any]) -> None:
    """Write a list."""
    if not writer.again(value):
        _put_list_items(writer, value)


def put_dict(writer: Writer, value: dict[Any, Any]) -> None:
    """Write a dictionary in its own order, because code that iterates over it sees that."""
    if not writer.again(value):
        _put_dict_items(writer, value)


def put_set(writer: Writer, value: set[Any]) -> None:
    """Write a set in its own order: code that iterates over it sees that. It may move with the hash seed."""
    if not writer.again(value):
        _put_set_items(writer, value)


def put_frozenset(writer: Writer, value: frozenset[Any]) -> None:
    """Write a frozenset in its own order; like a tuple it has no number."""
    writer.head(b"frozenset", frozenset.__len__(value))
    writer.put_items(frozenset.__iter__(value))


def _put_list_items(writer: Writer, value: list[Any]) -> None:
    writer.head(b"list", list.__len__(value))
    writer.put_items(list.__iter__(value))


def _put_dict_items(writer: Writer, value: dict[Any, Any]) -> None:
    # As stored, not as a subclass would have them.
    ordered = isinstance(value, collections.OrderedDict)
    items: Any = collections.OrderedDict.items if ordered else dict.items
    writer.head(b"dict", 2 * dict.__len__(value))
    writer.put_pairs(items(value))


def _put_set_items(writer: Writer, value: set[Any]) -> None:
    writer.head(b"set", set.__len__(value))
    writer.put_items(set.__iter__(value))


def _put_default_items(writer: Writer, value: collections.defaultdict[Any, Any]) -> None:
    writer.head(b"defaultdict", 2)
    writer.put_at(".default_factory", value.default_factory)
    _put_dict_items(writer, value)


def _put_deque_items(writer: Writer, value: collections.deque[Any]) -> None:
    writer.head(b"deque", 1 + collections.deque.__len__(value))
    writer.put(value.maxlen)
    writer.put_items(collections.deque.__iter__(value))


def _put_bytearray_items(writer: Writer, value: bytearray) -> None:
    writer.head(b"bytearray", 1)
    writer.out += data_bytes(value)


def _put_proxy(writer: Writer, value: MappingProxyType[Any, Any]) -> None:
    # The mapping behind it may be shared and changed; asking the proxy for items would run a user's code.
    if not writer.again(value):
        writer.head(b"mappingproxy", 1)
        writer.put_at("", gc.get_referents(value)[0])


def _put_slice(writer: Writer, value: slice | range) -> None:
    writer.head(b"slice" if isinstance(value, slice) else b"range", 3)
    for part in (value.start, value.stop, value.step):
        writer.put_at(".start", part)


def _put_sentinel(writer: Writer, value: object) -> None:
    # It has no state; all it can be asked is whether it is the same one, and its number says that.
    if not writer.again(value):
        writer.head(b"sentinel", 0)


def member_state(member: enum.Enum) -> dict[str, Any]:
    """What was set on a member of an enumeration beside its name and value."""
    return {name: item for name, item in member.__dict__.items() if name not in _OF_EVERY_MEMBER}


def _put_enum(writer: Writer, value: enum.Enum) -> None:
    if writer.again(value):
        return
    writer.head(b"member", 4)
    writer.put_class(type(value))
    # As stored: a subclass may say otherwise of its members' names and values.
    own = value.__dict__
    writer.put(own["_name_"])
    writer.put_at(".value", own["_value_"])
    writer.put_at(".__dict__", member_state(value))


def once(write: Handler) -> Handler:
    """Give a number to values that are written without one."""

    def put(writer: Writer, value: Any) -> None:
        if not writer.again(value):
            write(writer, value)

    return put


def subclass_of(base: type, write: Handler) -> Handler:
    """How to write an instance of a subclass of a builtin: class, payload, attributes."""

    def put(writer: Writer, value: Any) -> None:
        cls = type(value)
        hidden = getattr(cls, "n_fields", 0) != getattr(cls, "n_sequence_fields", 0)
        if hidden or cls.__basicsize__ > explained_size(cls, base):
            raise writer.error(f"a {writer.class_label(cls)} has state that cannot be read")
        if writer.again(value):
            return
        writer.head(b"subclass", 3)
        writer.put_class(cls)
        write(writer, value)
        writer.put_state(value, writer.ignored(cls))

    return put


def _exactly(base: type, exact: Callable[[Any], Any]) -> Handler:
    def put(writer: Writer, value: Any) -> None:
        # The builtin's own conversion, so that an overridden __str__ or __index__ is not asked.
        writer.out += SCALARS[base](exact(value))

    return put


_OF_EVERY_MEMBER = frozenset({"_name_", "_value_", "__objclass__", "_sort_order_"})

HANDLERS: Mapping[type, Handler] = {
    tuple: put_tuple,
    list: put_list,
    dict: put_dict,
    set: put_set,
    frozenset: put_frozenset,
    bytearray: once(_put_bytearray_items),
    collections.OrderedDict: subclass_of(collections.OrderedDict, _put_dict_items),
    collections.defaultdict: once(_put_default_items),
    collections.deque: once(_put_deque_items),
    MappingProxyType: _put_proxy,
    slice: _put_slice,
    range: _put_slice,
    object: _put_sentinel,
    SimpleNamespace: Writer.put_object,
}

FAMILIES: list[tuple[type, Handler]] = [
    (enum.Enum, _put_enum),
    (str, subclass_of(str, _exactly(str, lambda value: str.__str__(value)))),
    (bytes, subclass_of(bytes, _exactly(bytes, lambda value: bytes.__getitem__(value, slice(None))))),
    (int, subclass_of(int, _exactly(int, int.__pos__))),
    (float, subclass_of(float, _exactly(float, float.__pos__))),
    (complex, subclass_of(complex, _exactly(complex, complex.__pos__))),
    (tuple, subclass_of(tuple, put_tuple)),
    (list, subclass_of(list, _put_list_items)),
    (collections.OrderedDict, subclass_of(collections.OrderedDict, _put_dict_items)),
    (collections.defaultdict, subclass_of(collections.defaultdict, _put_default_items)),
    (dict, subclass_of(dict, _put_dict_items)),
    (set, subclass_of(set, _put_set_items)),
    (frozenset, subclass_of(frozenset, put_frozenset)),
    (collections.deque, subclass_of(collections.deque, _put_deque_items)),
    (bytearray, subclass_of(bytearray, _put_bytearray_items)),
]
"""Subclasses of what has handlers of its own. Sets and dictionaries come after their special kinds."""


class PlainWriter(Writer):
    """Writes what stands in this file, and objects made in Python; nothing of torch or numpy."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()
        self.handlers = HANDLERS
        self.families = FAMILIES


def put_code(writer: Writer, code: CodeType, nested: Callable[[CodeType], None]) -> None:
    """Write what a code object does. File names, line numbers and comments are left out.

    Args:
        writer: Where to.
        code: The code object. Its bytecode belongs to one version of Python, which has to be a factor.
        nested: Writes a code object among its constants.
    """
    writer.head(b"code", 8 + len(code.co_consts))
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    for part in (counts, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars):
        writer.put(part)
    writer.text(code.co_name)
    writer.out += data_bytes(code.co_code) + data_bytes(code.co_exceptiontable)
    for index, const in enumerate(code.co_consts):
        if type(const) is CodeType:
            nested(const)
        elif type(const) is frozenset and _only_contains(code, index):
            # ``x in {"a", "b"}``: its order, which moves with the hash seed, is not seen.
            put_members(writer, const)
        else:
            writer.put_at(f" constant {index}", const)


def put_members(writer: Writer, value: set[Any] | frozenset[Any]) -> None:
    """Write a set of plain values of which nobody sees the order."""
    writer.head(b"members", len(value))
    writer.out += b"".join(sorted(map(_alone, value)))


def _alone(value: Any) -> bytes:
    writer = PlainWriter()
    writer.put(value)
    return bytes(writer.out)


def _only_contains(code: CodeType, index: int) -> bool:
    """Whether a constant is only asked what it contains."""
    import dis

    found = [item for item in dis.get_instructions(code) if item.opname not in {"CACHE", "EXTENDED_ARG"}]
    uses = [at for at, item in enumerate(found) if item.opcode in dis.hasconst and item.arg == index]
    return all(at + 1 < len(found) and found[at + 1].opname == "CONTAINS_OP" for at in uses)
