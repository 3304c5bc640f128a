"""Source files of modules: where they are, what is in them, and whether they are what was imported."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from types import CodeType, FunctionType, ModuleType
from typing import Any

from stitchcache.keys.origins import module_by_label

_SLACK = 2.0
"""Seconds by which a file's time and the process's start may be off."""


def read_source(module: ModuleType) -> bytes:
    """The bytes of the file that a module came from.

    Raises:
        OSError: It has none, or it cannot be read.
    """
    file = getattr(module, "__file__", None)
    if file is None:
        raise FileNotFoundError(f"module {module.__name__} has no file")
    return read_file(file, module)


def read_file(file: str, module: ModuleType | None = None) -> bytes:
    """The bytes of a module's file; through its loader where it lies in an archive.

    Raises:
        OSError: It cannot be read.
    """
    try:
        with open(file, "rb") as stream:
            return stream.read()
    except NotADirectoryError:
        get_data = getattr(getattr(module, "__loader__", None), "get_data", None)
        if get_data is None:
            raise
        return bytes(get_data(file))


def find_file(label: str, main: str) -> tuple[str | None, ModuleType | None]:
    """Where a module's source is, without running any of its packages' code.

    Args:
        label: The module's name in a record.
        main: This process's name for ``__main__``.

    Returns:
        Its file, or ``None`` where there is no such module; and the module if it is loaded.
    """
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


def changed_since_import(module: ModuleType, source: bytes, started: float) -> str | None:
    """Whether a module's file was edited after it was imported; then the file does not say what runs.

    Files older than the process cannot have been. For the others the source is compiled again, and every
    function of the module must be found in the result.

    Args:
        module: The module as it was imported.
        source: What its file holds now.
        started: When this process started, see :func:`process_start`.

    Returns:
        A reason, or ``None`` where the module is what its file says.
    """
    file = getattr(module, "__file__", None) or ""
    if not file.endswith(".py") or not _younger(file, started):
        return None
    try:
        compiled = compile(source, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return f"{file} was changed since it was imported"
    known = {(code.co_qualname, code.co_code, repr(_plain(code))) for code in _nested(compiled)}
    for name, code in _codes_of(module):
        if (code.co_qualname, code.co_code, repr(_plain(code))) not in known:
            return f"{file} was changed since it was imported: {name} is not what runs"
    return None


def _plain(code: CodeType) -> tuple[Any, ...]:
    consts = [const for const in code.co_consts if type(const) in {int, float, str, bytes, bool, complex}]
    return code.co_names, code.co_varnames, consts


def _nested(code: CodeType) -> list[CodeType]:
    found = [code]
    for const in code.co_consts:
        if isinstance(const, CodeType):
            found += _nested(const)
    return found


def _codes_of(module: ModuleType) -> list[tuple[str, CodeType]]:
    """Functions and methods that were defined in a module, by name."""
    found = []
    for owner in [module, *(item for item in vars(module).values() if isinstance(item, type))]:
        if owner is not module and owner.__module__ != module.__name__:
            continue
        for value in list(vars(owner).values()):
            function = getattr(value, "__func__", value)
            function = function.fget if isinstance(function, property) else function
            if isinstance(function, FunctionType) and _is_from(function, module):
                found.append((function.__qualname__, function.__code__))
    return found


def _is_from(function: FunctionType, module: ModuleType) -> bool:
    return function.__globals__ is vars(module) and function.__code__.co_filename == module.__file__


def _younger(file: str, started: float) -> bool:
    try:
        return os.stat(file).st_mtime > started - _SLACK
    except OSError:
        return True


def process_start() -> float:
    """When this process started, in Unix seconds; 0 where the system does not tell."""
    try:
        with open("/proc/self/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        with open("/proc/stat", "rb") as file:
            boot = next(int(line.split()[1]) for line in file if line.startswith(b"btime"))
    except (OSError, StopIteration, ValueError, IndexError):
        return 0.0
    return boot + ticks / os.sysconf("SC_CLK_TCK")
