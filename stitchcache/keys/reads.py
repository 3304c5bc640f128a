"""What a code object reads from outside of itself, as its instructions say: globals, attributes, imports."""

from __future__ import annotations

import dis
import importlib.util
from collections.abc import Iterator
from types import CodeType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass


_GLOBAL = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})
_CELL = frozenset({"LOAD_DEREF", "LOAD_CLASSDEREF"})
_ATTRIBUTE = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_BETWEEN = frozenset({"CACHE", "PUSH_NULL", "PRECALL", "EXTENDED_ARG"})


@dataclass(frozen=True, slots=True)
class Import:
    """An import within a function.

    Args:
        module: The module's full name.
        names: What is read from it: imported names, or every attribute name that the code mentions.
        exact: These are imported names.
    """

    module: str
    names: tuple[str, ...]
    exact: bool


def global_chains(code: CodeType) -> list[tuple[str, ...]]:
    """Globals that a code object reads, each with the attributes that it takes from it at once."""
    return [chain for opname, chain in _chains(code) if opname in _GLOBAL]


def cell_chains(code: CodeType) -> list[tuple[str, ...]]:
    """The same for what a code object closes over: a module may be held in a cell, too."""
    return [chain for opname, chain in _chains(code) if opname in _CELL]


def _chains(code: CodeType) -> Iterator[tuple[str, tuple[str, ...]]]:
    opname, chain = "", [""]
    for instruction in dis.get_instructions(code):
        if instruction.opname in _BETWEEN:
            continue
        if opname and instruction.opname in _ATTRIBUTE:
            chain.append(str(instruction.argval))
            continue
        if opname:
            yield opname, tuple(chain)
            opname = ""
        if instruction.opname in _GLOBAL or instruction.opname in _CELL:
            opname, chain = instruction.opname, [str(instruction.argval)]
    if opname:
        yield opname, tuple(chain)


def imports_of(code: CodeType, package: str) -> Iterator[Import]:
    """Imports within a code object."""
    instructions = [item for item in dis.get_instructions(code) if item.opname not in _BETWEEN]
    for index, instruction in enumerate(instructions):
        if instruction.opname != "IMPORT_NAME":
            continue
        level, names = instructions[index - 2].argval, instructions[index - 1].argval
        module = str(instruction.argval)
        if level:
            module = importlib.util.resolve_name("." * level + module, package)
        if not names and "." in module:
            yield Import(module.partition(".")[0], code.co_names, False)
        yield Import(module, tuple(names or code.co_names), bool(names))
