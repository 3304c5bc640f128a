"""Bytes of values, the same in every process, and different for values that differ. Imports no torch.

The grammar is one for all kinds, so that no two of them can run into one another::

    value     = scalar | reference | composite
    composite = "[" kind " " count ":" followed by exactly count values
    scalar    = N | T | F | E | I | "i" digits ";" | "d" 8 bytes | "c" 16 bytes | ("s" | "b") length ":" bytes
    reference = "@" text text number ";"

An object that has identity (anything that can be changed, or told apart by ``is``) is written where it is met
first and referred to from then on, by the section in which it was met and its number there. All sections of
one key share one numbering, so sharing counts wherever it crosses them. Scalars, tuples and frozensets have
no identity: Python may or may not make two equal ones one object.

Only listed types are written. Anything else is refused with the place where it was met.
"""

from __future__ import annotations

import collections
import enum
import gc
import logging
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from types import CodeType, MappingProxyType, MemberDescriptorType, SimpleNamespace
from typing import Any

MAX_DEPTH = 64
_MANAGED_DICT = 1 << 4
_POINTER = struct.calcsize("P")


class UnkeyableError(ValueError):
    """A value that no digest stands for soundly; the reason names it, so that one can act on it.

    Args:
        path: Where the value was met, such as ``layers.3.lock``.
        why: What is the matter with it.
    """

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path}: {why}" if path else why)
        self.path = path
        self.why = why

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.why)


def text_bytes(value: str) -> bytes:
    """A string with its length in front."""
    data = value.encode("utf-8", "surrogatepass")
    return b"s%d:%b" % (len(data), data)


def data_bytes(value: bytes | bytearray) -> bytes:
    """Bytes with their length in front."""
    return b"b%d:%b" % (len(value), bytes(value))


_double = struct.Struct("<d").pack
SCALARS: Mapping[type, Callable[[Any], bytes]] = {
    type(None): lambda value: b"N",
    bool: lambda value: b"T" if value else b"F",
    int: lambda value: b"i%d;" % value,
    float: lambda value: b"d" + _double(value),
    complex: lambda value: b"c" + _double(value.real) + _double(value.imag),
    str: text_bytes,
    bytes: data_bytes,
    type(...): lambda value: b"E",
    type(NotImplemented): lambda value: b"I",
}
"""Values without parts, by exact type."""

Layout = tuple[bool, list[tuple[str, MemberDescriptorType]]]
Handler = Callable[[Any, Any], None]


class Numbers:
    """Which objects were met, and where each was met first.

    Attributes:
        known: Where each was met first, by id: section, place in it, number.
        kept: The objects themselves: a temporary's id could be another object's a moment later.
    """

    __slots__ = ("kept", "known")

    def __init__(self, parent: Numbers | None = None) -> None:
        self.known: dict[int, tuple[str, str, int]] = dict(parent.known) if parent else {}
        self.kept: list[Any] = [parent] if parent else []

    def add(self, value: Any, section: str, where: str, number: int) -> None:
        """Call an object by the place where it was met first."""
        self.known[id(value)] = (section, where, number)
        self.kept.append(value)

    def place(self, value: Any) -> str:
        """Where an object was met first, in one text."""
        section, where, number = self.known[id(value)]
        return f"{section}:{where}:{number}"

    def reference(self, value: Any) -> bytes | None:
        """How an object is referred to; ``None`` where it was not met. Most never are, so it is made here."""
        known = self.known.get(id(value))
        if known is None:
            return None
        section, where, number = known
        return b"@%b%b%d;" % (text_bytes(section), text_bytes(where), number)


class Writer:
    """Writes values into one buffer.

    Args:
        numbers: Objects that were met; writers of one key share them.
        section: What is being written; with ``where`` it is given to one writer of a key only.
        where: Which of several.
        path: Where the first value stands, for reasons.

    Attributes:
        handlers: How to write a value of exactly this type.
        families: How to write an instance of this type or a subclass; the first match wins.
    """

    __slots__ = ("count", "families", "handlers", "numbers", "out", "path", "section", "where")

    def __init__(
        self, numbers: Numbers | None = None, section: str = "", where: str = "", path: Iterable[str] = ()
    ) -> None:
        self.handlers: Mapping[type, Handler] = HANDLERS
        self.families: Iterable[tuple[type, Handler]] = FAMILIES
        self.numbers = numbers or Numbers()
        self.out = bytearray()
        self.path = list(path)
        self.section, self.where, self.count = section, where, 0

    def begin(self, section: str, where: str, path: list[str]) -> None:
        """Empty the buffer for the next section."""
        self.out.clear()
        self.path = path
        self.section, self.where, self.count = section, where, 0

    def put(self, value: Any) -> None:
        """Write one value.

        Raises:
            UnkeyableError: It cannot be written soundly.
        """
        kind = type(value)
        scalar = SCALARS.get(kind)
        if scalar is not None:
            self.out += scalar(value)
            return
        if len(self.path) > MAX_DEPTH:
            raise self.error(f"nested more than {MAX_DEPTH} deep")
        handler = self.handlers.get(kind)
        if handler is not None:
            handler(self, value)
            return
        for family, write in self.families:
            # By type: a class may claim to be another through a __class__ property.
            if issubclass(kind, family):
                write(self, value)
                return
        self.put_object(value)

    def put_at(self, step: str, value: Any) -> None:
        """Write a part of a value, one step further down the path."""
        self.path.append(step)
        self.put(value)
        self.path.pop()

    def head(self, kind: bytes, count: int) -> None:
        """Begin a composite of so many values. Each kind belongs to one place in the code."""
        self.out += b"[%b %d:" % (kind, count)

    def text(self, value: str) -> None:
        """Write a string that is part of an encoding."""
        self.out += text_bytes(value)

    def again(self, value: Any) -> bool:
        """Write a reference if this very object was met before, else number it."""
        numbers = self.numbers
        if id(value) in numbers.known:
            self.out += numbers.reference(value) or b""
            return True
        numbers.add(value, self.section, self.where, self.count)
        self.count += 1
        return False

    def error(self, why: str) -> UnkeyableError:
        """An error that names the present path."""
        return UnkeyableError("".join(self.path).lstrip("."), why)

    def class_label(self, cls: type) -> str:
        """A class's name for people and keys, the same in every process."""
        module = cls.__module__
        if not isinstance(module, str):
            raise self.error(f"class {cls.__qualname__} has no module")
        return f"{module}.{cls.__qualname__}"

    def put_class(self, cls: type) -> None:
        """Write a class by name."""
        self.head(b"class", 1)
        self.text(self.class_label(cls))

    def layout(self, cls: type) -> Layout:
        """Whether all state of a class's instances is in sight, and their slots."""
        return layout_of(cls)

    def ignored(self, cls: type) -> frozenset[str]:
        """Attributes of instances that are left out."""
        return frozenset()

    def put_items(self, items: Iterable[Any]) -> None:
        """Write the parts of a sequence."""
        for index, item in enumerate(items):
            scalar = SCALARS.get(type(item))
            if scalar is not None:
                self.out += scalar(item)
            else:
                self.put_at(f"[{index}]", item)

    def put_pairs(self, items: Iterable[tuple[Any, Any]]) -> None:
        """Write keys and values of a mapping."""
        for key, item in items:
            scalar = SCALARS.get(type(key))
            if scalar is not None:
                self.out += scalar(key)
            else:
                self.put_at(" key", key)
            scalar = SCALARS.get(type(item))
            if scalar is not None:
                self.out += scalar(item)
            else:
                self.put_at(f"[{key!r}]" if isinstance(key, (str, int)) else "[...]", item)

    def put_state(self, value: Any, ignore: frozenset[str] = frozenset()) -> None:
        """Write an object's own attributes, in their order: its dictionary, then its slots."""
        state: dict[str, Any] = getattr(value, "__dict__", {})
        items = [(name, item) for name, item in state.items() if name not in ignore]
        for name, descriptor in self.layout(type(value))[1]:
            try:
                items.append((name, descriptor.__get__(value)))
            except AttributeError:
                continue
        self.head(b"state", 2 * len(items))
        for name, item in items:
            if not isinstance(name, str):
                raise self.error(f"an attribute is called {name!r}, which is no string")
            self.text(name)
            self.put_at(f".{name}", item)

    def put_object(self, value: Any) -> None:
        """Write an instance of a class made in Python: its class and its attributes.

        Raises:
            UnkeyableError: Part of its state is out of sight (made in C, or with identity semantics).
        """
        cls = type(value)
        if not self.layout(cls)[0]:
            raise self.error(f"a {self.class_label(cls)} has state that cannot be read, or stands for itself")
        if self.again(value):
            return
        self.head(b"object", 2)
        self.put_class(cls)
        self.put_state(value, self.ignored(cls))


def slots_of(cls: type) -> list[tuple[str, MemberDescriptorType]]:
    """Slots that Python classes in the method resolution order declare, base classes first."""
    found = []
    for base in reversed(cls.__mro__):
        if "__slots__" in base.__dict__:
            found += [
                (name, item) for name, item in base.__dict__.items() if isinstance(item, MemberDescriptorType)
            ]
    return found


def _explained_size(cls: type, base: type) -> int:
    """How large an instance is whose state beyond its base's is in a dictionary and declared slots."""
    size = base.__basicsize__ + _POINTER * len(slots_of(cls))
    if cls.__dictoffset__ != 0 and base.__dictoffset__ == 0 and not cls.__flags__ & _MANAGED_DICT:
        size += _POINTER
    if cls.__weakrefoffset__ > 0 and base.__weakrefoffset__ == 0:
        size += _POINTER
    return size


def layout_of(cls: type) -> Layout:
    """Whether all state of an instance is in its dictionary and declared slots; and those slots.

    The size of an instance tells: anything beyond the two was put there by C code. It is the test that
    ``object.__reduce_ex__`` makes before it pickles an object that way.
    """
    slots = slots_of(cls)
    if isinstance(cls, enum.EnumMeta) or issubclass(cls, logging.Logger):
        return False, slots
    made_in_python = any("__dict__" in base.__dict__ or "__slots__" in base.__dict__ for base in cls.__mro__)
    in_sight = cls.__itemsize__ == 0 and cls.__basicsize__ <= _explained_size(cls, object)
    return made_in_python and in_sight, slots


def find_class(module: str, qualname: str) -> object:
    """What a module's name and a qualified name lead to; ``None`` where they lead nowhere."""
    found: object = sys.modules.get(module)
    for step in qualname.split("."):
        found = getattr(found, "__dict__", {}).get(step)
    return found


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
        if hidden or cls.__basicsize__ > _explained_size(cls, base):
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
    writer = Writer()
    writer.put(value)
    return bytes(writer.out)


def _only_contains(code: CodeType, index: int) -> bool:
    """Whether a constant is only asked what it contains."""
    import dis

    found = [item for item in dis.get_instructions(code) if item.opname not in {"CACHE", "EXTENDED_ARG"}]
    uses = [at for at, item in enumerate(found) if item.opcode in dis.hasconst and item.arg == index]
    return all(at + 1 < len(found) and found[at + 1].opname == "CONTAINS_OP" for at in uses)
