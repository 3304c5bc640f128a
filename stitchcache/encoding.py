"""Bytes of values, the same in every process, and different for values that differ. Imports no torch.

The grammar is one for all kinds, so that no two of them can run into one another::

    value     = scalar | reference | composite
    composite = "[" kind " " count ":" followed by exactly count values
    scalar    = N | T | F | E | I | int | "d" 8 bytes | "c" 16 bytes | ("s" | "b") length ":" bytes
    int       = "i" digits ";" | "i0x" hexadecimal digits ";"
    reference = "@" text text number ";"

An object that has identity (it can be changed, or told apart by ``is``) is written where it is met first, and
referred to from then on, across all sections of a key. Scalars, tuples and frozensets have none: Python may
or may not make two equal ones one object. Only listed types are written; anything else is refused.
"""

from __future__ import annotations

import enum
import hashlib
import logging
import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MemberDescriptorType
from typing import Any

from stitchcache.types import Factor

MAX_DEPTH = 64
SHORT = 120  # characters of a factor's value that are kept for people
LONG = 1000  # of one that is a container

_MANAGED_DICT = 1 << 4
_POINTER = struct.calcsize("P")


class UnkeyableError(ValueError):
    """A value that no digest stands for soundly: where it was met, such as ``layers.3.lock``, and why."""

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


def make_factor(name: str, value: str, payload: bytes | None = None) -> Factor:
    """A factor: a dotted name, a value for people, and the digest of the whole value."""
    data = value.encode("utf-8", "surrogatepass") if payload is None else payload
    # Of a container enough is kept to say which item differs.
    kept = shorten(value, LONG if value[:1] in ("{", "[", "(") else SHORT)
    return Factor(name=name, value=kept, digest=hashlib.sha256(data).hexdigest())


def shorten(text: str, limit: int = SHORT) -> str:
    """Cut a text for display; what is cut off is still in the digest."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


_SECRET_NAMES = ("token", "secret", "passw", "passphrase", "credential", "api_key", "apikey", "auth")
_LONGEST_WORD = 19


def is_telling(name: str, text: str) -> bool:
    """Whether a text says something of a model to people, and nothing of who built it.

    No rule knows every secret: what looks like a key, a path or an address is left to the digest.
    """
    lowered = name.lower()
    named = any(word in lowered for word in _SECRET_NAMES)
    if named or text.startswith(("/", "~", "-----")) or "://" in text:
        return False
    words = "".join(c if c.isalnum() else " " for c in text).split()
    return all(len(word) <= _LONGEST_WORD for word in words)


_double = struct.Struct("<d").pack
_LONG = 1 << 4096  # Python refuses to write larger ints in decimal, as its user has set it


SCALARS: Mapping[type, Callable[[Any], bytes]] = {
    type(None): lambda value: b"N",
    bool: lambda value: b"T" if value else b"F",
    int: lambda value: b"i%d;" % value if -_LONG < value < _LONG else b"i0x%x;" % value,
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
Step = str | int | tuple[Any]
"""A step of a path: its text, an index, or a key of a mapping in a tuple; made a text for an error only."""


class Numbers(dict[int, tuple[str, str, int, Any]]):
    """Which objects were met, and where each was met first, by id: section, place in it, number.

    The objects are kept: a temporary's id could be another object's a moment later.
    """

    def add(self, value: Any, section: str, where: str, number: int) -> None:
        """Call an object by the place where it was met first."""
        self[id(value)] = (section, where, number, value)

    def place(self, value: Any) -> str:
        """Where an object was met first, in one text."""
        section, where, number, _ = self[id(value)]
        return f"{section}:{where}:{number}"

    def reference(self, value: Any) -> bytes | None:
        """How an object is referred to; ``None`` where it was not met."""
        known = self.get(id(value))
        if known is None:
            return None
        return b"@%b%b%d;" % (text_bytes(known[0]), text_bytes(known[1]), known[2])


class Writer:
    """Writes values into one buffer: scalars, and objects made in Python. Subclasses know more kinds.

    ``handlers`` say how to write a value of exactly a type, ``families`` an instance of a type or a subclass
    (the first match wins), and ``found`` which was chosen, by the type's id. Writers of one key share
    ``numbers``, and each has a ``section`` and ``where`` of its own.
    """

    handlers: Mapping[type, Handler] = {}
    families: Sequence[tuple[type, Handler]] = ()

    def __init__(
        self, numbers: Numbers | None = None, section: str = "", where: str = "", path: Iterable[Step] = ()
    ) -> None:
        self.found: dict[int, tuple[type, Handler]] = {}
        self.numbers = numbers if numbers is not None else Numbers()
        self.out = bytearray()
        self.path = list(path)
        self.section, self.where, self.count = section, where, 0
        # Whether all state of a class's instances is in sight, and their slots; attributes that are left out.
        self.layout: Callable[[type], Layout] = layout_of
        self.ignored: Callable[[type], frozenset[str]] = lambda cls: frozenset()

    def put(self, value: Any) -> None:
        """Write one value, or raise an UnkeyableError."""
        kind = type(value)
        scalar = SCALARS.get(kind)
        if scalar is not None:
            self.out += scalar(value)
            return
        if len(self.path) > MAX_DEPTH:
            raise self.error(f"nested more than {MAX_DEPTH} deep; keep such data out of the model")
        handler = self.handlers.get(kind)
        if handler is None:
            # By id: a metaclass may say that two classes are equal.
            found = self.found.get(id(kind))
            handler = found[1] if found is not None else self._choose(kind)
        handler(self, value)

    def _choose(self, kind: type) -> Handler:
        # By type: a class may claim to be another through a __class__ property.
        chosen = (write for family, write in self.families if issubclass(kind, family))
        handler = next(chosen, type(self).put_object)
        self.found[id(kind)] = (kind, handler)
        return handler

    def bytes_with(self, value: Any) -> bytes:
        """Write one value, and give all that was written."""
        self.put(value)
        return bytes(self.out)

    def put_at(self, step: Step, value: Any) -> None:
        """Write a part of a value, one step further down the path."""
        scalar = SCALARS.get(type(value))
        if scalar is not None:
            self.out += scalar(value)
            return
        self.path.append(step)
        self.put(value)
        self.path.pop()

    def put_items(self, items: Iterable[Any]) -> None:
        """Write the parts of a sequence."""
        for index, item in enumerate(items):
            self.put_at(index, item)

    def put_pairs(self, items: Iterable[tuple[Any, Any]]) -> None:
        """Write keys and values of a mapping."""
        for key, item in items:
            self.put_at(" key", key)
            self.put_at((key,), item)

    def pairs(self, kind: bytes, items: Collection[tuple[Any, Any]]) -> None:
        """Write a composite of names or keys and values, in the order given."""
        self.head(kind, 2 * len(items))
        self.put_pairs(items)

    def parts(self, kind: bytes, *items: Any) -> None:
        """Write a composite of these values."""
        self.head(kind, len(items))
        self.put_items(items)

    def head(self, kind: bytes, count: int) -> None:
        """Begin a composite of so many values. Each kind belongs to one place in the code."""
        self.out += b"[%b %d:" % (kind, count)

    def text(self, value: str) -> None:
        """Write a string that is part of an encoding."""
        self.out += text_bytes(value)

    def again(self, value: Any) -> bool:
        """Write a reference if this very object was met before, else number it."""
        numbers = self.numbers
        if id(value) in numbers:
            self.out += numbers.reference(value) or b""
            return True
        # As Numbers.add does: one call less for each object.
        numbers[id(value)] = (self.section, self.where, self.count, value)
        self.count += 1
        return False

    def error(self, why: str) -> UnkeyableError:
        """An error that names the present path."""
        return UnkeyableError(self.at(), why)

    def at(self) -> str:
        """The present path, for people."""
        return "".join(map(_step_text, self.path)).lstrip(".")

    def class_label(self, cls: type) -> str:
        """A class's name for people and keys, the same in every process."""
        if not isinstance(cls.__module__, str):
            raise self.error(f"class {cls.__qualname__} has no module; define it in one")
        return f"{cls.__module__}.{cls.__qualname__}"

    def put_class(self, cls: type) -> None:
        """Write a class by name."""
        self.out += b"[class 1:" + text_bytes(self.class_label(cls))

    def put_state(self, value: Any, ignore: frozenset[str] = frozenset()) -> None:
        """Write an object's own attributes, in their order: its dictionary, then its slots."""
        items = state_of(value, ignore, self.layout(type(value))[1])
        self.head(b"state", 2 * len(items))
        for name, item in items:
            if not isinstance(name, str):
                raise self.error(f"an attribute is called {name!r}, which is no string; use names")
            self.text(name)
            self.put_at(f".{name}", item)

    def put_object(self, value: Any) -> None:
        """Write an instance of a class made in Python: its class and its attributes."""
        cls = type(value)
        if not self.layout(cls)[0]:
            hidden = "has state that cannot be read, or stands for itself; hold plain values"
            raise self.error(f"a {self.class_label(cls)} {hidden}")
        if self.again(value):
            return
        self.head(b"object", 2)
        self.put_class(cls)
        self.put_state(value, self.ignored(cls))


def _step_text(step: Step) -> str:
    if isinstance(step, tuple):
        return f"[{step[0]!r}]" if isinstance(step[0], (str, int)) else "[...]"
    return step if isinstance(step, str) else f"[{step}]"


def state_of(
    value: Any, ignore: frozenset[str], slots: list[tuple[str, MemberDescriptorType]]
) -> list[tuple[str, Any]]:
    """An object's own attributes: its dictionary's, then those of its slots that are set."""
    # Asked of its class first: a __getattr__ of the user's may answer for it, or raise.
    state: dict[str, Any] = value.__dict__ if type(value).__dictoffset__ else {}
    items = [item for item in state.items() if item[0] not in ignore]
    for name, descriptor in slots:
        try:
            items.append((name, descriptor.__get__(value)))
        except AttributeError:
            continue
    return items


def slots_of(cls: type) -> list[tuple[str, MemberDescriptorType]]:
    """Slots that Python classes in the method resolution order declare, base classes first."""
    declaring = [vars(base) for base in reversed(cls.__mro__) if "__slots__" in vars(base)]
    return [item for body in declaring for item in body.items() if isinstance(item[1], MemberDescriptorType)]


def explained_size(cls: type, base: type) -> int:
    """How large an instance is whose state beyond its base's is in a dictionary and declared slots."""
    size = base.__basicsize__ + _POINTER * len(slots_of(cls))
    if cls.__dictoffset__ != 0 and base.__dictoffset__ == 0 and not cls.__flags__ & _MANAGED_DICT:
        size += _POINTER
    if cls.__weakrefoffset__ > 0 and base.__weakrefoffset__ == 0:
        size += _POINTER
    return size


def layout_of(cls: type) -> Layout:
    """Whether all state of an instance is in its dictionary and declared slots; and those slots."""
    slots = slots_of(cls)
    if isinstance(cls, enum.EnumMeta) or issubclass(cls, logging.Logger):
        return False, slots
    made_in_python = any("__dict__" in vars(base) or "__slots__" in vars(base) for base in cls.__mro__)
    in_sight = cls.__itemsize__ == 0 and cls.__basicsize__ <= explained_size(cls, object)
    return made_in_python and in_sight, slots
