"""Where code comes from: which files a version stands for, what a module is called, and what its file holds.

torch, the standard library and stitchcache stand by their versions, which are factors. So do the packages
that torch requires and traces with, such as sympy. All other code is known by its bytes.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import time
from collections.abc import Iterable
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

from stitchcache.containers import code_digest
from stitchcache.keys.code import CACHE, WRAPPED, filled_cells

_SITE = os.path.dirname(os.path.dirname(os.path.abspath(torch.__file__)))
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_REQUIRED_BY_TORCH = tuple("sympy mpmath networkx jinja2 markupsafe fsspec filelock triton numpy".split())  # noqa: SIM905
_VERSIONED = (
    *(os.path.join(_SITE, name) + os.sep for name in ("torch", "torchgen", "functorch", *_REQUIRED_BY_TORCH)),
    os.path.join(_SITE, "typing_extensions.py"),
    _PACKAGE + os.sep,
    "<frozen ",
)
# The demo's models are models like anybody's, and are edited like anybody's.
_DEMO = os.path.join(_PACKAGE, "demo") + os.sep
_VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
# What sysconfig would say, without the milliseconds that asking it takes.
_STDLIB = tuple(
    {
        os.path.dirname(os.__file__) + os.sep,
        os.path.join(sys.base_exec_prefix, sys.platlibdir, _VERSION) + os.sep,
    }
)
_SITE_NAMES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")

VERSIONED_PACKAGES = frozenset(
    {"torch", "torchgen", "functorch", "stitchcache", "builtins", "typing_extensions", *_REQUIRED_BY_TORCH}
)
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
    return filename.startswith(_VERSIONED) or in_stdlib(filename)


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


_SLACK = 2.0  # seconds by which a file's time and the process's start may be off


def read_file(file: str, module: ModuleType | None = None) -> bytes:
    """The bytes of a module's file, or an OSError; through its loader where it lies in an archive."""
    try:
        with open(file, "rb") as stream:
            return stream.read()
    except NotADirectoryError:
        get_data = getattr(getattr(module, "__loader__", None), "get_data", None)
        if get_data is None:
            raise
        return bytes(get_data(file))


def find_file(label: str, main: str) -> tuple[str | None, ModuleType | None]:
    """Where a module's source is, and the module if it is loaded; runs none of its packages' code."""
    module = module_by_label(label, main)
    if module is not None:
        return getattr(module, "__file__", None), module
    top, *rest = label.split(".")
    loaded = sys.modules.get(top)
    spec: Any = loaded.__spec__ if loaded is not None else _find_top(top)
    name = top
    for step in rest:
        name = f"{name}.{step}"
        parent = sys.modules.get(name.rpartition(".")[0])
        found = getattr(spec, "submodule_search_locations", None)
        path = getattr(parent, "__path__", None) if parent else found
        if path is None:
            return None, None
        spec = importlib.machinery.PathFinder.find_spec(name, list(path))
    return getattr(spec, "origin", None), None


def _find_top(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def changed_since_import(
    module: ModuleType, source: bytes, started: float, ran: Iterable[CodeType] = ()
) -> str | None:
    """Why what runs of a module is not what its file says; ``None`` where it is.

    Files that nobody touched since the process started cannot have been edited. For the others ``source``,
    what the file holds now, is compiled, and every function of the module must be found in the result. Code
    that ``ran`` is always looked for: bytecode that Python keeps may be that of an older text of the same
    size and time.
    """
    file = getattr(module, "__file__", None) or ""
    suspicious = _touched(file, started) or _bytecode_is_older(module, file)
    found = [*ran, *(_codes_of(module) if suspicious else ())]
    if not file.endswith(".py") or not found:
        return None
    try:
        compiled = compile(source, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return f"{file} was changed since it was imported; start the process again"
    known = {(code.co_qualname, code_digest(code)) for code in _nested(compiled)}
    for code in found:
        if (code.co_qualname, code_digest(code)) not in known:
            why = f"{file} was changed since it was imported: {code.co_qualname} is not what runs"
            return f"{why}; start the process again"
    return None


def _nested(code: CodeType) -> list[CodeType]:
    inner = [_nested(const) for const in code.co_consts if isinstance(const, CodeType)]
    return [code, *(item for items in inner for item in items)]


_PARTS: dict[type, tuple[str, ...]] = {**WRAPPED, MethodType: ("__func__",), CACHE: ("__wrapped__",)}


def _codes_of(module: ModuleType) -> list[CodeType]:
    """The code of functions that a module's names and its classes' attributes lead to, also when wrapped."""
    file = module.__file__
    found: list[CodeType] = []
    todo: list[Any] = list(vars(module).values())
    met: set[int] = set()
    while todo:
        item = todo.pop()
        if id(item) in met:
            continue
        met.add(id(item))
        if isinstance(item, type):
            if item.__module__ == module.__name__:
                todo += vars(item).values()
        elif isinstance(item, FunctionType):
            if item.__code__.co_filename == file:
                found.append(item.__code__)
            # A decorator's own function closes over the one that it was given.
            todo += filled_cells(item)
        else:
            todo += _inner(item)
    return found


def _inner(item: Any) -> list[Any]:
    """What a wrapper wraps; for an object of a class made in Python, the functions among its attributes."""
    parts = _PARTS.get(type(item))
    if parts is not None:
        return [getattr(item, name, None) for name in parts]
    try:
        # Not getattr: a proxy would run code, or import what it stands for.
        held = object.__getattribute__(item, "__dict__")
    except AttributeError:
        return []
    return [value for value in held.values() if type(value) is FunctionType or type(value) in _PARTS]


def _touched(file: str, started: float) -> bool:
    """Whether a file may have been written since the process started; a copy may keep its old mtime."""
    try:
        found = os.stat(file)
    except OSError:
        return True
    return max(found.st_mtime, found.st_ctime) > started - _SLACK


def _bytecode_is_older(module: ModuleType, file: str) -> bool:
    """Whether a user's file was touched after its bytecode was written, which Python may have run."""
    cached = getattr(module, "__cached__", None)
    if cached is None or installed_path(file):
        return False
    try:
        return os.stat(file).st_ctime > os.stat(cached).st_mtime + _SLACK
    except OSError:
        return False


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
