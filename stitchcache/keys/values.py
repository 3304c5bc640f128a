"""Canonical bytes of plain values, containers and objects.

An encoding is self-delimiting and tagged by type, so that two different values never share their bytes.
It does not depend on addresses or on the hash seed: sets are sorted by their elements' bytes, and an
object that occurs twice is written once and referred to by the path where it was first met. Dictionaries
keep their order, because code that iterates over one sees it.

A class is written by name; its contents are collected in :attr:`Shared.classes`, and whoever owns the
encoder writes each of them once.
"""

from __future__ import annotations

import enum
import logging
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from types import CodeType, FunctionType, MemberDescriptorType
from typing import TYPE_CHECKING, Any

from stitchcache.keys.origins import installed_path, main_label, module_stands_by_version, stands_by_version

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass


MAX_DEPTH = 64
_MANAGED_DICT = 1 << 4
_POINTER = struct.calcsize("P")


WARM_CACHE = (
    "has results from before the capture in its lru_cache, and how they came about was not seen; "
    "call its cache_clear() before compiling"
)


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


@dataclass(slots=True)
class Shared:
    """What the encoders of one key have in common.

    Args:
        main: What ``__main__`` is called.
        classes: Classes that were met, by id; their contents are part of the key too.
        functions: Digests of functions, by id; holds the function, so that the id stays its own.
        codes: Digests of code objects, by id.
        versioned: Whether a version stands for a module, by name.
        named: Classes as their names are written, by id, and whether the name leads to them.
        families: Filled by whoever makes the encoders.
        origins: What is known of source files, by name.
        layouts: Whether a class's instances have plain state, and in which slots.
        contents: Bytes of classes' contents, by id; holds the class, so that the id stays its own.
        texts: Strings as they are written: names of attributes repeat from class to class.
        files: What is known of modules' files, by name: file, size, digest, and why it is not what runs.
        caches: Functions with an ``lru_cache`` that were met, with where.
    """

    main: str = field(default_factory=main_label)
    classes: dict[int, type] = field(default_factory=dict)
    functions: dict[int, tuple[FunctionType, bytes]] = field(default_factory=dict)
    codes: dict[int, tuple[CodeType, bytes]] = field(default_factory=dict)
    versioned: dict[str, bool] = field(default_factory=dict)
    named: dict[int, tuple[type, bytes, str]] = field(default_factory=dict)
    families: list[tuple[type, Any]] = field(default_factory=list)
    origins: dict[str, tuple[bool, str]] = field(default_factory=dict)
    layouts: dict[type, tuple[bool, list[tuple[str, MemberDescriptorType]]]] = field(default_factory=dict)
    contents: dict[int, tuple[type, bytes]] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, tuple[str, int, str, str | None]] = field(default_factory=dict)
    caches: list[tuple[str, Any]] = field(default_factory=list)

    def warm_cache(self) -> str | None:
        """Why a function that was met may answer from its ``lru_cache``; ``None`` where all are empty.

        What it read when it was called is in no key. Those of installed packages are left to the look.
        """
        for where, cached in self.caches:
            code = getattr(cached.__wrapped__, "__code__", None)
            known = code is not None and any(self.origin(code.co_filename))
            if not known and cached.cache_info().currsize:
                return f"{where} {WARM_CACHE}"
        return None

    def origin(self, filename: str) -> tuple[bool, str]:
        """Whether a version stands for a file; and its path below the packages if it is installed."""
        known = self.origins.get(filename)
        if known is None:
            known = self.origins[filename] = (stands_by_version(filename), installed_path(filename))
        return known

    def layout(self, cls: type) -> tuple[bool, list[tuple[str, MemberDescriptorType]]]:
        """Whether instances of a class have plain state, and their slots; remembered."""
        known = self.layouts.get(cls)
        if known is None:
            known = self.layouts[cls] = (has_plain_state(cls), slots_of(cls))
        return known

    def is_versioned(self, module: str) -> bool:
        """Whether a version stands for a module; remembered, as the answer needs a look at its file."""
        known = self.versioned.get(module)
        if known is None:
            known = self.versioned[module] = module_stands_by_version(module)
        return known


def text_bytes(value: str) -> bytes:
    """A string with its length in front."""
    data = value.encode("utf-8", "surrogatepass")
    return b"s%d:%s" % (len(data), data)


def _float(value: float) -> bytes:
    # Every NaN is one value; a payload or a sign of it means nothing to a graph.
    return b"d" + struct.pack("<d", value) if value == value else b"dNaN....."


SCALARS: Mapping[type, Callable[[Any], bytes]] = {
    type(None): lambda value: b"N",
    bool: lambda value: b"T" if value else b"F",
    int: lambda value: b"i%d;" % value,
    float: _float,
    complex: lambda value: b"c" + _float(value.real) + _float(value.imag),
    str: text_bytes,
    bytes: lambda value: b"b%d:%s" % (len(value), value),
    type(...): lambda value: b"E",
    type(NotImplemented): lambda value: b"I",
}
"""Values without parts, by exact type."""

Handler = Callable[["Encoder", Any], None]

_VERSIONED, _REACHABLE, _UNREACHABLE = "versioned", "reachable", "unreachable"


class Encoder:
    """Writes values into one buffer.

    Args:
        handlers: How to write a value of exactly this type.
        families: How to write an instance of this type or a subclass, first match wins.
        contents: How to write what a class's body holds.
        shared: What this key's encoders have in common.
        path: Where the first value stands, for reasons and back references.
    """

    __slots__ = (
        "active",
        "contents",
        "families",
        "handlers",
        "kept",
        "out",
        "path",
        "seen",
        "shared",
        "start",
    )

    def __init__(
        self,
        handlers: Mapping[type, Handler],
        families: Sequence[tuple[type, Handler]],
        contents: Handler,
        shared: Shared,
        path: Sequence[str] = (),
    ) -> None:
        self.out = bytearray()
        self.path = list(path)
        # Back references count from here, so that bytes do not say where a value was met first.
        self.start = len(self.path)
        self.seen: dict[int, bytes] = {}
        self.kept: list[Any] = []
        self.shared = shared
        self.handlers = handlers
        self.families = families
        self.contents = contents
        self.active: list[int] = []

    def fresh(self) -> Encoder:
        """An encoder of the same key with an empty buffer and no back references."""
        new = Encoder(self.handlers, self.families, self.contents, self.shared, self.path)
        new.active = self.active
        return new

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

    def text(self, value: str) -> None:
        """Write a string that is part of an encoding."""
        known = self.shared.texts.get(value)
        if known is None:
            known = self.shared.texts[value] = text_bytes(value)
        self.out += known

    def error(self, why: str) -> UnkeyableError:
        """An error that names the present path."""
        return UnkeyableError("".join(self.path).lstrip("."), why)

    def again(self, value: Any) -> bool:
        """Write a back reference if this very object was written before, else remember it."""
        known = self.seen.get(id(value))
        if known is not None:
            self.out += b"@%d:%s" % (len(known), known)
            return True
        self.seen[id(value)] = "".join(self.path[self.start :]).encode("utf-8", "surrogatepass")
        # Held, because a temporary's id could be another object's a moment later.
        self.kept.append(value)
        return False

    def class_label(self, cls: type) -> str:
        """A class's name for people and keys, the same in every process."""
        module = cls.__module__
        if not isinstance(module, str):
            raise self.error(f"class {cls.__qualname__} has no module")
        return f"{self.shared.main if module == '__main__' else module}.{cls.__qualname__}"

    def put_class(self, cls: type, *, contents: bool = True) -> None:
        """Write a class by name, and note that its contents matter.

        The contents of a class that its name does not lead to, such as one made in a function, are
        written here and now.
        """
        known = self.shared.named.get(id(cls))
        if known is None:
            known = self.shared.named[id(cls)] = self._name_class(cls)
        self.out += known[1]
        if contents and known[2] == _UNREACHABLE and not self.again(cls):
            self.contents(self, cls)
        elif known[2] == _REACHABLE and id(cls) not in self.shared.classes:
            self.shared.classes[id(cls)] = cls

    def _name_class(self, cls: type) -> tuple[type, bytes, str]:
        label = self.class_label(cls)
        if self.shared.is_versioned(cls.__module__):
            how = _VERSIONED
        else:
            how = _REACHABLE if find_class(cls.__module__, cls.__qualname__) is cls else _UNREACHABLE
        return cls, b"C" + text_bytes(label), how

    def put_state(self, value: Any, ignore: frozenset[str] = frozenset()) -> None:
        """Write an object's own attributes: its dictionary and its slots."""
        state: dict[str, Any] = getattr(value, "__dict__", {})
        items = [(name, item) for name, item in state.items() if name not in ignore]
        for name, descriptor in self.shared.layout(type(value))[1]:
            try:
                items.append((name, descriptor.__get__(value)))
            except AttributeError:
                continue
        self.out += b"o%d:" % len(items)
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
        if not self.shared.layout(cls)[0]:
            raise self.error(f"a {self.class_label(cls)} has state that cannot be read, or stands for itself")
        if self.again(value):
            return
        self.out += b"O"
        self.put_class(cls)
        self.put_state(value)


def find_class(module: str, qualname: str) -> object:
    """What a module's name and a qualified name lead to; ``None`` where they lead nowhere."""
    found: object = sys.modules.get(module)
    for step in qualname.split("."):
        found = getattr(found, "__dict__", {}).get(step)
    return found


def slots_of(cls: type) -> list[tuple[str, MemberDescriptorType]]:
    """Slots that Python classes in the method resolution order declare, base classes first."""
    found = []
    for base in reversed(cls.__mro__):
        if "__slots__" in base.__dict__:
            found += [
                (name, item) for name, item in base.__dict__.items() if isinstance(item, MemberDescriptorType)
            ]
    return found


def has_plain_state(cls: type) -> bool:
    """Whether all state of an instance is in its dictionary and declared slots.

    The size of an instance tells: anything beyond the two was put there by C code. It is the test that
    ``object.__reduce_ex__`` makes before it pickles an object that way.
    """
    if isinstance(cls, enum.EnumMeta) or issubclass(cls, logging.Logger):
        return False
    size = object.__basicsize__ + _POINTER * len(slots_of(cls))
    if cls.__dictoffset__ != 0 and not cls.__flags__ & _MANAGED_DICT:
        size += _POINTER
    if cls.__weakrefoffset__ > 0:
        size += _POINTER
    made_in_python = any("__dict__" in base.__dict__ or "__slots__" in base.__dict__ for base in cls.__mro__)
    return made_in_python and cls.__itemsize__ == 0 and cls.__basicsize__ <= size
