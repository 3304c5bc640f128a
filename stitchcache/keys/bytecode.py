"""What code does, as its bytecode says: which globals it reads, what it imports, and what no key answers."""

from __future__ import annotations

import dis
import importlib.util
import os
import sys
from collections.abc import Collection, Iterator
from types import CodeType, FrameType

from stitchcache.keys.walk import installed_path

_SEES_NAMESPACES = frozenset({"__globals__", "f_globals", "__builtins__"})
_ASKS_UNKNOWN = frozenset(
    """__hash__ is_shared is_inference _is_view _version storage_offset untyped_storage data_ptr""".split()  # noqa: SIM905
)
"""Methods and attributes that tell where an object lies in memory, or what happened to it before."""

GLOBAL = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})
CELL = frozenset({"LOAD_DEREF", "LOAD_CLASSDEREF"})
_ATTRIBUTE = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_VIEWS, _OF_SETS = frozenset({"keys", "items"}), frozenset("&|-^")
_OLD = sys.version_info < (3, 12)
_BETWEEN = frozenset({"CACHE", "PUSH_NULL", "PRECALL", "EXTENDED_ARG"})

Chain = tuple[str, ...]


def chains(code: CodeType, loads: Collection[str] = GLOBAL) -> Iterator[tuple[Chain, bool]]:
    """Globals that code reads, each with the attributes that it takes from it at once, and if it calls it."""
    chain, called = list[str](), False
    for instruction in dis.get_instructions(code):
        if instruction.opname in _BETWEEN:
            continue
        if not chain or instruction.opname not in _ATTRIBUTE:
            if chain:
                yield tuple(chain), called
            chain.clear()
        if chain or instruction.opname in loads:
            chain.append(str(instruction.argval))
            called = _is_to_call(instruction)


def _is_to_call(instruction: dis.Instruction) -> bool:
    """Whether an instruction loads something in order to call it, as its lowest bit or its name says."""
    # Before Python 3.12, LOAD_METHOD says so, and the bit of LOAD_ATTR is a part of its name's index.
    flagged = {"LOAD_GLOBAL"} if _OLD else {"LOAD_GLOBAL", "LOAD_ATTR"}
    flag = bool((instruction.arg or 0) & 1)
    return instruction.opname == "LOAD_METHOD" or (instruction.opname in flagged and flag)


def makes_sets(code: CodeType) -> bool:
    """Whether code makes a set, in whose order the hash seed may show; ``len`` and ``sorted`` hide it."""
    before, views = "", not _VIEWS.isdisjoint(code.co_names)
    for instruction in dis.get_instructions(code):
        if instruction.opname in _BETWEEN:
            continue
        joined = views and instruction.opname == "BINARY_OP" and instruction.argrepr.rstrip("=") in _OF_SETS
        if joined or instruction.opname in {"BUILD_SET", "SET_ADD"}:
            return True
        named = str(instruction.argval) if instruction.opname == "LOAD_GLOBAL" else ""
        if named in {"set", "frozenset"} and _is_to_call(instruction) and before not in {"len", "sorted"}:
            return True
        before = named
    return False


def imports_of(code: CodeType, package: str) -> Iterator[tuple[str, Chain, bool]]:
    """Imports within code: module, attributes read from it, and whether the import names just those."""
    instructions = [item for item in dis.get_instructions(code) if item.opname not in _BETWEEN]
    for index, instruction in enumerate(instructions):
        if instruction.opname != "IMPORT_NAME":
            continue
        level, names = instructions[index - 2].argval, instructions[index - 1].argval
        module = str(instruction.argval)
        if level:
            module = importlib.util.resolve_name("." * level + module, package)
        if not names and "." in module:
            yield module.partition(".")[0], code.co_names, False
        yield module, tuple(names or code.co_names), bool(names)


def asks_unknown(code: CodeType) -> str | None:
    """Why code may not read what it reads; ``None`` if it asks for nothing that no key has."""
    names = set() if installed_path(code.co_filename) else set(code.co_names)
    if names & _SEES_NAMESPACES:
        return "looks into a namespace as a whole; name what is read from it"
    if asked := sorted(names & _ASKS_UNKNOWN):
        name = asked[0]
        return f"asks for {name}, which no key says; ask when the model is built, and keep the answer on it"
    return None


def receiver_of(frame: FrameType, code: CodeType) -> type | None:
    """The class that a method runs for; ``None`` for a plain function."""
    if not code.co_argcount or not code.co_varnames or code.co_varnames[0] not in {"self", "cls"}:
        return None
    value = frame.f_locals.get(code.co_varnames[0])
    return value if isinstance(value, type) else type(value)


def place(code: CodeType) -> str:
    """A function's name and where it is written, for messages."""
    return f"{code.co_qualname} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"
