"""How Python's own values are written: containers, their subclasses, members of enumerations, code.

Imports no torch. The grammar stands in ``stitchcache.encoding``.
"""

from __future__ import annotations

import collections
import enum
import gc
import hashlib
from collections.abc import Callable, Mapping
from types import CodeType, MappingProxyType, SimpleNamespace
from typing import Any

from stitchcache.encoding import SCALARS, Handler, Writer, data_bytes, explained_size


def once(write: Handler) -> Handler:
    """Give a number to values that are written without one."""

    def put(writer: Writer, value: Any) -> None:
        if not writer.again(value):
            write(writer, value)

    return put


def _sequence(kind: bytes, base: Any) -> Handler:
    """How to write what is in a builtin container, in its own order, which code sees; sets included."""

    def put(writer: Writer, value: Any) -> None:
        writer.head(kind, base.__len__(value))
        writer.put_items(base.__iter__(value))

    return put


def _put_dict_items(writer: Writer, value: dict[Any, Any]) -> None:
    # As stored, not as a subclass would have them.
    base = collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict
    writer.head(b"dict", 2 * dict.__len__(value))
    writer.put_pairs(base.items(value))


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
    writer.head(b"mappingproxy", 1)
    writer.put_at("", gc.get_referents(value)[0])


_OF_EVERY_MEMBER = frozenset({"_name_", "_value_", "__objclass__", "_sort_order_"})


def member_state(member: enum.Enum) -> dict[str, Any]:
    """What was set on a member of an enumeration beside its name and value."""
    return {name: item for name, item in member.__dict__.items() if name not in _OF_EVERY_MEMBER}


def _put_enum(writer: Writer, value: enum.Enum) -> None:
    writer.head(b"member", 4)
    writer.put_class(type(value))
    # As stored: a subclass may say otherwise of its members' names and values.
    writer.put(value.__dict__["_name_"])
    writer.put_at(".value", value.__dict__["_value_"])
    writer.put_at(".__dict__", member_state(value))


def _subclass_of(base: type, write: Handler) -> Handler:
    """How to write an instance of a subclass of a builtin: class, payload, attributes."""

    def put(writer: Writer, value: Any) -> None:
        cls = type(value)
        hidden = getattr(cls, "n_fields", 0) != getattr(cls, "n_sequence_fields", 0)
        if hidden or cls.__basicsize__ > explained_size(cls, base):
            label = writer.class_label(cls)
            raise writer.error(f"a {label} has state that cannot be read; hold plain values")
        if writer.again(value):
            return
        writer.head(b"subclass", 3)
        writer.put_class(cls)
        write(writer, value)
        writer.put_state(value, writer.ignored(cls))

    return put


def _exactly(base: Any) -> Handler:
    def put(writer: Writer, value: Any) -> None:
        # What the builtin itself pickles, so that an overridden __str__ or __index__ is not asked.
        writer.out += SCALARS[base](base(*base.__getnewargs__(value)))

    return put


_put_tuple, _put_frozenset = _sequence(b"tuple", tuple), _sequence(b"frozenset", frozenset)
_NUMBERED: Mapping[type, Handler] = {
    list: _sequence(b"list", list),
    collections.defaultdict: _put_default_items,
    dict: _put_dict_items,
    set: _sequence(b"set", set),
    collections.deque: _put_deque_items,
    bytearray: _put_bytearray_items,
}
_put_ordered = _subclass_of(collections.OrderedDict, _put_dict_items)
put_list, put_dict = once(_NUMBERED[list]), once(_NUMBERED[dict])

HANDLERS: Mapping[type, Handler] = {
    tuple: _put_tuple,
    frozenset: _put_frozenset,
    **{kind: once(write) for kind, write in _NUMBERED.items()},
    collections.OrderedDict: _put_ordered,
    MappingProxyType: once(_put_proxy),
    slice: lambda writer, value: writer.parts(b"slice", value.start, value.stop, value.step),
    range: lambda writer, value: writer.parts(b"range", value.start, value.stop, value.step),
    # It has no state; all it can be asked is whether it is the same one, and its number says that.
    object: once(lambda writer, value: writer.head(b"sentinel", 0)),
    SimpleNamespace: Writer.put_object,
}

FAMILIES: list[tuple[type, Handler]] = [
    (enum.Enum, once(_put_enum)),
    *((kind, _subclass_of(kind, _exactly(kind))) for kind in (str, bytes, int, float, complex)),
    (tuple, _subclass_of(tuple, _put_tuple)),
    (frozenset, _subclass_of(frozenset, _put_frozenset)),
    (collections.OrderedDict, _put_ordered),
    *((kind, _subclass_of(kind, write)) for kind, write in _NUMBERED.items()),
]
"""Subclasses of what has handlers of its own. Dictionaries come after their special kinds."""


class PlainWriter(Writer):
    """Writes what stands in this file, and objects made in Python; nothing of torch or numpy."""

    handlers, families = HANDLERS, FAMILIES


def put_code(writer: Writer, code: CodeType, nested: Callable[[CodeType], None]) -> None:
    """Write what a code object does; file names, line numbers and comments are left out.

    Bytecode belongs to one version of Python, which has to be a factor. ``nested`` writes a code object in
    it.
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


def code_digest(code: CodeType) -> bytes:
    """Digest of what a code object does, with the code objects in it."""
    writer = PlainWriter()
    put_code(writer, code, lambda inner: writer.put(code_digest(inner)))
    return hashlib.sha256(writer.out).digest()


def put_members(writer: Writer, value: set[Any] | frozenset[Any]) -> None:
    """Write a set of plain values of which nobody sees the order."""
    writer.head(b"members", len(value))
    writer.out += b"".join(sorted(PlainWriter().bytes_with(item) for item in value))


def _only_contains(code: CodeType, index: int) -> bool:
    """Whether a constant is only asked what it contains."""
    import dis  # few codes have such a constant

    found = [item for item in dis.get_instructions(code) if item.opname not in {"CACHE", "EXTENDED_ARG"}]
    uses = [at for at, item in enumerate(found) if item.opcode in dis.hasconst and item.arg == index]
    return all(at + 1 < len(found) and found[at + 1].opname == "CONTAINS_OP" for at in uses)
