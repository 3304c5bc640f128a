"""One walk over the whole of what a key covers, the writer that it writes with, and where code comes from.

torch, the standard library and stitchcache stand by their versions, which are factors. So do the packages
that torch requires and traces with, such as sympy. All other code is known by its bytes.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType, ModuleType
from typing import Any

import torch

from stitchcache import containers, encoding
from stitchcache.encoding import Handler, Numbers, Step, Writer, text_bytes
from stitchcache.keys import code, values
from stitchcache.torchside import CustomOpDef, OpOverload, OpOverloadPacket, custom_op_parts

_SITE = os.path.dirname(os.path.dirname(os.path.abspath(torch.__file__)))
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_REQUIRED_BY_TORCH = tuple("sympy mpmath networkx jinja2 markupsafe fsspec filelock triton numpy".split())  # noqa: SIM905
_OF_TORCH = ("torch", "torchgen", "functorch", *_REQUIRED_BY_TORCH)
_VERSIONED_FILES = (
    *(os.path.join(_SITE, name) + os.sep for name in _OF_TORCH),
    os.path.join(_SITE, "typing_extensions.py"),
    _PACKAGE + os.sep,
    "<frozen ",
)
# The demo's models are models like anybody's, and are edited like anybody's.
_DEMO = os.path.join(_PACKAGE, "demo") + os.sep
_VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
# What sysconfig would say, without the milliseconds that asking it takes.
_STDLIB = (
    os.path.dirname(os.__file__) + os.sep,
    os.path.join(sys.base_exec_prefix, sys.platlibdir, _VERSION) + os.sep,
)
_SITE_NAMES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")

VERSIONED_PACKAGES = frozenset({*_OF_TORCH, "stitchcache", "builtins", "typing_extensions"})
"""Top-level packages whose classes and functions are known by name alone."""


def in_stdlib(filename: str) -> bool:
    """Whether a file belongs to the standard library."""
    if filename.startswith(_STDLIB):
        return not any(name in filename for name in _SITE_NAMES)
    return filename.startswith("<frozen ")


def stands_by_version(filename: str) -> bool:
    """Whether a version stands for this file, so that its bytes are not looked at."""
    if filename.startswith(_DEMO):
        return False
    return filename.startswith(_VERSIONED_FILES) or in_stdlib(filename)


def installed_path(filename: str) -> str:
    """An installed file's path below the directory of packages; ``""`` for any other file."""
    for name in _SITE_NAMES:
        _, found, rest = filename.rpartition(name)
        if found:
            return rest
    return ""


def module_stands_by_version(name: str) -> bool:
    """The same for a module by name; a user's module that shadows one of the library's does not."""
    top = name.partition(".")[0]
    if name.startswith("stitchcache.demo."):
        return False
    if top in VERSIONED_PACKAGES:
        return True
    if top not in sys.stdlib_module_names:
        return False
    module = sys.modules.get(name) or sys.modules.get(top)
    file = getattr(module, "__file__", None)
    return file is None or in_stdlib(file)


def _name_from_file(file: str) -> str:
    """The dotted name under which a script would be imported: its stem, with the packages around it."""
    directory, base = os.path.split(os.path.abspath(file))
    parts = [os.path.splitext(base)[0]]
    while os.path.exists(os.path.join(directory, "__init__.py")):
        directory, package = os.path.split(directory)
        parts.insert(0, package)
    return ".".join(parts)


def main_label() -> str:
    """The name under which other processes would import what runs here as ``__main__``."""
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if main is None or file is None:
        return "__main__"
    spec = getattr(main, "__spec__", None)
    label = spec.name if spec is not None else _name_from_file(file)
    other = sys.modules.get(label)
    if other is not None and other is not main:
        its_file = getattr(other, "__file__", None)
        if its_file is None or os.path.realpath(its_file) != os.path.realpath(file):
            return "__main__"
    return str(label)


def module_by_label(label: str, main: str) -> ModuleType | None:
    """The loaded module that goes by a label: its name, or what :func:`main_label` says of ``__main__``."""
    module = sys.modules.get(label)
    if module is None and label == main:
        module = sys.modules.get("__main__")
    return module


def process_start() -> float:
    """When this process started, in Unix seconds; 0 where the system does not tell."""
    try:
        with open("/proc/self/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        # Not btime from /proc/stat: it is in whole seconds, and drifts from the clock that stamps files.
        boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
    return boot + ticks / os.sysconf("SC_CLK_TCK")


_HEAP_TYPE = 1 << 9
_WARM_CACHE = (
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


class Walk:
    """What one walk over a key has met: a key has one walk, and one numbering of objects."""

    def __init__(self) -> None:
        self.numbers = Numbers()
        self.classes: dict[int, type] = {}  # met, by id; their contents are part of the key too
        self.done: dict[int, type] = {}  # classes whose contents are written
        self.spans: list[tuple[int, int, str]] = []  # memory of tensors: first byte, end, name
        self.valued: set[int] = set()  # parameters and buffers also written by value, by id
        self.caches: list[tuple[str, Any]] = []  # functions with an ``lru_cache``, each with its place
        self._contents: dict[int, tuple[type, bytes]] = {}
        # What follows from the process alone.
        self.main = main_label()
        self.started = process_start()
        self.codes: dict[int, tuple[CodeType, bytes]] = {}
        # By module's name: file, size, digest, and why it is not what runs.
        self.files: dict[str, tuple[str, int, str, str | None]] = {}
        self.text_bytes = functools.cache(text_bytes)
        self.is_versioned = functools.cache(module_stands_by_version)
        self.layout = functools.cache(encoding.layout_of)
        self.origin = functools.cache(lambda file: (stands_by_version(file), installed_path(file)))
        self.families = _families()
        self.found: dict[int, tuple[type, Handler]] = {}
        self._named: dict[int, tuple[type, bytes, str]] = {}

    def child(self) -> Walk:
        """A walk that goes on from this one and does not change it: what the key has met is known there."""
        child = copy.copy(self)
        child.numbers = Numbers(self.numbers)
        child.classes, child.done = {}, {**self.done, **self.classes}
        child.spans, child.valued, child.caches = [], set(self.valued), []
        child._contents = {}
        return child

    def writer(self, section: str, where: str = "", path: Sequence[Step] = ()) -> KeyWriter:
        """A writer for one section of the key; no two sections have the same name and place."""
        return KeyWriter(self, section, where, path)

    def warm_cache(self, runs: Mapping[int, int] | None = None) -> str | None:
        """Why a function that was met may answer from its ``lru_cache``; ``None`` where none does.

        ``runs`` says how often code ran while it was watched: more misses than that were made before. Without
        it no cache may have results. Those of installed packages are left to the look.
        """
        for where, cached in self.caches:
            code = getattr(cached.__wrapped__, "__code__", None)
            info = cached.cache_info()
            if info.currsize == 0 or (code is not None and any(self.origin(code.co_filename))):
                continue
            if runs is None or code is None or info.misses > runs.get(id(code), 0):
                return f"{where} {_WARM_CACHE}"
        return None

    def label(self, module: str) -> str:
        """A module under the name by which other processes would import it."""
        return self.main if module == "__main__" else module

    def named(self, cls: type) -> tuple[type, bytes, str]:
        """A class with its name as it is written, and whether that name leads to it."""
        known = self._named.get(id(cls))
        if known is None:
            found = find_class(cls.__module__, cls.__qualname__) is cls
            # ``make_dataclass`` says that its classes are the library's. Some of torch's, made in C, have no
            # name that leads to them, either; those are torch's all the same.
            library = cls.__module__.partition(".")[0] in sys.stdlib_module_names
            made_here = not found and library and cls.__flags__ & _HEAP_TYPE and "__module__" in cls.__dict__
            how = _REACHABLE if found else _UNREACHABLE
            if self.is_versioned(cls.__module__) and not made_here:
                how = _VERSIONED
            name = text_bytes(f"{self.label(cls.__module__)}.{cls.__qualname__}")
            known = self._named[id(cls)] = (cls, b"[class 1:" + name, how)
        return known

    def note_class(self, cls: type) -> None:
        """Note that a class's contents matter."""
        if id(cls) not in self.done:
            self.classes.setdefault(id(cls), cls)

    def unwritten_classes(self) -> Iterator[type]:
        """Classes that were met and whose contents are to be written; those may name further classes."""
        while new := [cls for identity, cls in self.classes.items() if identity not in self.done]:
            for cls in new:
                self.done[id(cls)] = cls
                yield cls

    def contents(self, cls: type) -> bytes:
        """The bytes of a class's contents; each class is looked at once in a walk."""
        known = self._contents.get(id(cls))
        if known is None:
            label = f"{self.label(cls.__module__)}.{cls.__qualname__}"
            writer = self.writer("class", label, [f"class {label}"])
            code.put_class_contents(writer, cls)
            known = self._contents[id(cls)] = cls, bytes(writer.out)
        return known[1]


class KeyWriter(Writer):
    """Writes anything that can be keyed: plain values, code, torch, numpy, operators."""

    def __init__(self, walk: Walk, section: str, where: str, path: Sequence[Step]) -> None:
        super().__init__(walk.numbers, section, where, path)
        self.walk = walk
        self.handlers, self.families, self.found = _HANDLERS, walk.families, walk.found
        self.layout, self.ignored = walk.layout, values.ignored_names

    def begin(self, section: str, where: str, path: list[Step]) -> None:
        """Empty the buffer for the next section."""
        self.out.clear()
        self.path = path
        self.section, self.where, self.count = section, where, 0

    def text(self, value: str) -> None:
        """Write a string that is part of an encoding: names of attributes repeat from class to class."""
        self.out += self.walk.text_bytes(value)

    def class_label(self, cls: type) -> str:
        """A class's name for people and keys, the same in every process."""
        if cls.__module__ == "__main__":
            return f"{self.walk.main}.{cls.__qualname__}"
        return super().class_label(cls)

    def put_class(self, cls: type) -> None:
        """Write a class by name and note it; one that its name does not lead to is written here and now."""
        if not isinstance(cls.__module__, str):
            raise self.error(f"class {cls.__qualname__} has no module; define it in one")
        _, name, how = self.walk.named(cls)
        if how == _UNREACHABLE:
            if not self.again(cls):
                self.head(b"local class", 1)
                code.put_class_contents(self, cls)
            return
        self.out += name
        if how == _REACHABLE:
            self.walk.note_class(cls)


def _put_module_reference(writer: KeyWriter, module: ModuleType) -> None:
    """Write a Python module that is a value, by name; its user must not edit it or set attributes of it."""
    if not writer.walk.is_versioned(module.__name__):
        raise writer.error(f"the module {module.__name__} is held as a value; import it where it is used")
    writer.parts(b"module", module.__name__)


def _put_member_of_torch(writer: KeyWriter, value: Any) -> None:
    """Write any other value; enumerations made in C++, such as SDPBackend, are known by their names."""
    cls = type(value)
    if hasattr(cls, "__members__") and cls.__module__.partition(".")[0] == "torch":
        writer.parts(b"torch member", f"{cls.__module__}.{cls.__qualname__}.{value.name}")
        return
    writer.put_object(value)


_HANDLERS: Mapping[type, Handler] = {**containers.HANDLERS, **values.HANDLERS, **code.HANDLERS}


def _families() -> Sequence[tuple[type, Handler]]:
    """How values of these types and their subclasses are written; the first match wins."""
    return [
        (type, KeyWriter.put_class),
        *values.TORCH_FAMILIES,
        (OpOverload, values.by_text(b"operator")),
        (OpOverloadPacket, values.by_text(b"operator")),
        (CustomOpDef, containers.once(lambda w, op: w.pairs(b"custom op", custom_op_parts(op).items()))),
        (ModuleType, _put_module_reference),
        *values.late_families(),
        *code.FAMILIES,
        *values.LIBRARY_FAMILIES,
        *containers.FAMILIES,
        (object, _put_member_of_torch),
    ]


def plain_bytes(value: Any) -> bytes:
    """Bytes of one value that stands alone, such as an option, or an UnkeyableError."""
    return Walk().writer("value").bytes_with(value)
