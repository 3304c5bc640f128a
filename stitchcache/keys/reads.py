"""What a code object reads from outside of itself: globals, attributes of modules, imports."""

from __future__ import annotations

import builtins
import dis
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import torch

from stitchcache.keys.encoder import class_contents, new_encoder
from stitchcache.keys.origins import installed_path
from stitchcache.keys.values import SCALARS, Shared, UnkeyableError

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass


_GLOBAL = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})
_ATTRIBUTE = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_BETWEEN = frozenset({"CACHE", "PUSH_NULL", "PRECALL", "EXTENDED_ARG"})
_ABSENT = b"absent"
_KEYED_OF_LIBRARY = (*SCALARS, FunctionType, BuiltinFunctionType, type)
"""Kinds of values that are keyed even where they belong to torch or the library: they may be replaced."""


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


_OPS = (type(torch.ops), type(torch.ops.aten))


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


@dataclass(frozen=True, slots=True)
class Found:
    """Where a chain leads.

    Args:
        value: What it leads to.
        exists: Whether there is such a thing.
        used: The part of the chain that leads there; the rest is within the value, which is keyed whole.
        owner: The last module on the way, or ``""``.
    """

    value: Any
    exists: bool
    used: tuple[str, ...]
    owner: str = ""


def lookup(namespace: dict[str, Any], chain: tuple[str, ...]) -> Found:
    """Follow a chain through modules."""
    name = chain[0]
    if name in namespace:
        value = namespace[name]
    elif hasattr(builtins, name):
        value = getattr(builtins, name)
    else:
        return Found(None, False, chain[:1])
    owner = ""
    for index, step in enumerate(chain[1:], 1):
        if not isinstance(value, ModuleType):
            return Found(value, True, chain[:index], owner)
        inner, owner = vars(value), value.__name__
        if step not in inner and isinstance(value, _OPS):
            # torch makes these the first time they are asked for; that nobody has says nothing.
            getattr(value, step, None)
        if step not in inner:
            return Found(value, False, chain[: index + 1], owner)
        value = inner[step]
    return Found(value, True, chain, owner)


def title(entry: str) -> str:
    """An entry's name for people: ``module.name``."""
    return entry.removeprefix("?").replace(":", ".").rstrip(".")


def global_digest(shared: Shared, entry: str, found: Found) -> str:
    """Digest of what a global's name leads to.

    Args:
        shared: What this record's encoders have in common; classes that the value names are noted there.
        entry: Its name in the record. It ends in a dot where the code goes on to read from the value;
            elsewhere the code holds the value itself, which for a module says nothing of what it reads.
        found: Where its chain leads.

    Raises:
        UnkeyableError: No digest stands for it soundly.
    """
    payload = _ABSENT
    value, exists = found.value, found.exists
    library = found.owner != "" and shared.is_versioned(found.owner)
    if isinstance(value, ModuleType):
        if exists and not entry.endswith(".") and not _may_be_held(shared, value):
            why = f"the module {value.__name__} is used as a value; name what is read from it"
            raise UnkeyableError(f"global {title(entry)}", why)
        # torch and others load parts of themselves late; that a part is not there yet means nothing.
        payload = b"module " + value.__name__.encode()
    elif exists:
        encoder = new_encoder(shared, [f"global {title(entry)}"])
        if library and not isinstance(value, _KEYED_OF_LIBRARY):
            # An object of torch's or the library's own; what torch's settings say are factors.
            payload = b"object " + type(value).__qualname__.encode()
        else:
            encoder.put(value)
            payload = bytes(encoder.out)
    return hashlib.sha256(payload).hexdigest()


def _may_be_held(shared: Shared, module: ModuleType) -> bool:
    file = getattr(module, "__file__", None) or ""
    return shared.is_versioned(module.__name__) or installed_path(file) != ""


def class_digest(shared: Shared, cls: type) -> str:
    """Digest of a class's contents.

    Raises:
        UnkeyableError: One of its attributes cannot be written soundly.
    """
    return hashlib.sha256(class_contents(shared, cls)).hexdigest()


def text_digest(value: str | None) -> str:
    """Digest of an environment variable; ``None`` where it is not set."""
    data = b"unset" if value is None else b"=" + value.encode("utf-8", "surrogatepass")
    return hashlib.sha256(data).hexdigest()


def is_module_namespace(namespace: dict[str, Any]) -> bool:
    """Whether a function's globals are those of a module that is imported under its name."""
    module = sys.modules.get(str(namespace.get("__name__")))
    return module is not None and vars(module) is namespace


def bytes_digest(data: bytes) -> str:
    """sha256 of a file's bytes."""
    return hashlib.sha256(data).hexdigest()
