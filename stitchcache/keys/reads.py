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


def global_chains(code: CodeType) -> Iterator[tuple[str, ...]]:
    """Globals that a code object reads, each with the attributes that it takes from it at once."""
    chain: list[str] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname in _BETWEEN:
            continue
        if chain and instruction.opname in _ATTRIBUTE:
            chain.append(str(instruction.argval))
            continue
        if chain:
            yield tuple(chain)
            chain = []
        if instruction.opname in _GLOBAL:
            chain = [str(instruction.argval)]
    if chain:
        yield tuple(chain)


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
