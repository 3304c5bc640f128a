"""What one walk over a key has met, and the writer that it writes with."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any

from stitchcache import encoding
from stitchcache.encoding import Handler, Layout, Numbers, Writer, text_bytes
from stitchcache.keys.origins import (
    installed_path,
    main_label,
    module_stands_by_version,
    process_start,
    stands_by_version,
)

_HEAP_TYPE = 1 << 9
WARM_CACHE = (
    "has results from before the capture in its lru_cache, and how they came about was not seen; "
    "call its cache_clear() before compiling"
)
_VERSIONED, _REACHABLE, _UNREACHABLE = "versioned", "reachable", "unreachable"


def find_class(module: str, qualname: str) -> object:
    """What a module's name and a qualified name lead to; ``None`` where they lead nowhere."""
    found: object = sys.modules.get(module)
    for step in qualname.split("."):
        found = getattr(found, "__dict__", {}).get(step)
    return found


class Scope(ABC):
    """What one walk over a key has met. A key has one, with one numbering of objects over all of its factors.

    A record's globals belong to the key under which the record lies, so they are digested in a child of its
    walk: an object that the key has met is known there by its number.

    Args:
        parent: The walk to go on from, as it stands; it is not changed.

    Attributes:
        main: What ``__main__`` is called.
        numbers: Objects that were met.
        classes: Classes that were met, by id; their contents are part of the key too.
        done: Classes that the parent met.
        codes: Digests of code objects, by id.
        origins: What is known of source files, by name.
        spans: Memory of tensors and arrays, each with what it is called: first byte, end, name.
        valued: Parameters and buffers that were also written by value, by id.
        caches: Functions with an ``lru_cache`` that were met, each with its place.
        files: What is known of modules' files, by name: file, size, digest, and why it is not what runs.
    """

    def __init__(self, parent: Scope | None = None) -> None:
        self.main: str = parent.main if parent else main_label()
        self.numbers: Numbers = Numbers(parent.numbers if parent else None)
        self.classes: dict[int, type] = {}
        self.done: dict[int, type] = {**parent.done, **parent.classes} if parent else {}
        self.spans: list[tuple[int, int, str]] = []
        self.valued: set[int] = set(parent.valued) if parent else set()
        self.caches: list[tuple[str, Any]] = []
        self._contents: dict[int, bytes] = {}
        # What follows from the process alone is common to all of its walks.
        self.codes: dict[int, tuple[CodeType, bytes]] = parent.codes if parent else {}
        self.origins: dict[str, tuple[bool, str]] = parent.origins if parent else {}
        self.files: dict[str, tuple[str, int, str, str | None]] = parent.files if parent else {}
        self._started: float | None = parent._started if parent else None
        self._versioned: dict[str, bool] = parent._versioned if parent else {}
        self._named: dict[int, tuple[type, bytes, str]] = parent._named if parent else {}
        self._layouts: dict[type, Layout] = parent._layouts if parent else {}
        self.texts: dict[str, bytes] = parent.texts if parent else {}
        self.handlers: Mapping[type, Handler] = parent.handlers if parent else self.new_handlers()
        self.families: Sequence[tuple[type, Handler]] = parent.families if parent else self.new_families()
        self.found: dict[int, tuple[type, Handler]] = parent.found if parent else {}

    @abstractmethod
    def new_handlers(self) -> Mapping[type, Handler]:
        """How values of exactly these types are written."""

    @abstractmethod
    def new_families(self) -> Sequence[tuple[type, Handler]]:
        """How values of these types and their subclasses are written; the first match wins."""

    @abstractmethod
    def put_contents(self, writer: KeyWriter, cls: type) -> None:
        """Write what a class's body holds."""

    @abstractmethod
    def ignored(self, cls: type) -> frozenset[str]:
        """Attributes that say where a class or its instances came from, not what they compute."""

    def writer(self, section: str, where: str = "", path: Sequence[str] = ()) -> KeyWriter:
        """A writer for one section of the key; no two sections have the same name and place."""
        return KeyWriter(self, section, where, path)

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

    def started(self) -> float:
        """When this process started; remembered, as the system is slow to tell."""
        if self._started is None:
            self._started = process_start()
        return self._started

    def layout(self, cls: type) -> Layout:
        """Whether instances of a class have plain state, and their slots; remembered."""
        known = self._layouts.get(cls)
        if known is None:
            known = self._layouts[cls] = encoding.layout_of(cls)
        return known

    def is_versioned(self, module: str) -> bool:
        """Whether a version stands for a module; remembered, as the answer needs a look at its file."""
        known = self._versioned.get(module)
        if known is None:
            known = self._versioned[module] = module_stands_by_version(module)
        return known

    def label(self, cls: type) -> str:
        """A class's name for people and keys, the same in every process."""
        return f"{self.main if cls.__module__ == '__main__' else cls.__module__}.{cls.__qualname__}"

    def named(self, cls: type) -> tuple[type, bytes, str]:
        """A class with its name as it is written, and whether that name leads to it."""
        known = self._named.get(id(cls))
        if known is None:
            found = find_class(cls.__module__, cls.__qualname__) is cls
            # ``make_dataclass`` says that its classes are the library's. Some of torch's, made in C, have no
            # name that leads to them, either; those are torch's all the same.
            library = cls.__module__.partition(".")[0] in sys.stdlib_module_names
            made_here = not found and library and cls.__flags__ & _HEAP_TYPE and "__module__" in cls.__dict__
            if self.is_versioned(cls.__module__) and not made_here:
                how = _VERSIONED
            else:
                how = _REACHABLE if found else _UNREACHABLE
            known = self._named[id(cls)] = (cls, b"[class 1:" + text_bytes(self.label(cls)), how)
        return known

    def note_class(self, cls: type) -> None:
        """Note that a class's contents matter."""
        if id(cls) not in self.done:
            self.classes.setdefault(id(cls), cls)

    def contents(self, cls: type) -> bytes:
        """The bytes of a class's contents; each class is looked at once in a walk.

        Raises:
            UnkeyableError: One of its attributes cannot be written soundly.
        """
        known = self._contents.get(id(cls))
        if known is None:
            self.numbers.kept.append(cls)
            label = self.label(cls)
            writer = self.writer("class", label, [f"class {label}"])
            self.put_contents(writer, cls)
            known = self._contents[id(cls)] = bytes(writer.out)
        return known


class KeyWriter(Writer):
    """Writes anything that can be keyed: plain values, code, torch, numpy, operators."""

    __slots__ = ("walk",)

    def __init__(self, walk: Scope, section: str, where: str, path: Sequence[str]) -> None:
        super().__init__(walk.numbers, section, where, path)
        self.walk = walk
        self.handlers = walk.handlers
        self.families = walk.families
        self.found = walk.found

    def text(self, value: str) -> None:
        """Write a string that is part of an encoding: names of attributes repeat from class to class."""
        known = self.walk.texts.get(value)
        if known is None:
            known = self.walk.texts[value] = text_bytes(value)
        self.out += known

    def class_label(self, cls: type) -> str:
        """A class's name for people and keys, the same in every process."""
        if not isinstance(cls.__module__, str):
            raise self.error(f"class {cls.__qualname__} has no module")
        return self.walk.label(cls)

    def layout(self, cls: type) -> Layout:
        """Whether instances of a class have plain state, and their slots."""
        return self.walk.layout(cls)

    def ignored(self, cls: type) -> frozenset[str]:
        """Attributes that say where a class or its instances came from, not what they compute."""
        return self.walk.ignored(cls)

    def put_class(self, cls: type, *, contents: bool = True) -> None:
        """Write a class by name, and note that its contents matter.

        The contents of a class that its name does not lead to, such as one made in a function, are
        written here and now.
        """
        self.class_label(cls)
        known = self.walk.named(cls)
        if known[2] == _UNREACHABLE and contents:
            if not self.again(cls):
                self.head(b"local class", 1)
                self.walk.put_contents(self, cls)
            return
        self.out += known[1]
        if known[2] == _REACHABLE:
            self.walk.note_class(cls)
