"""What code reads from outside of itself, as its instructions say, and how that is noted while it runs."""

from __future__ import annotations

import builtins
import contextlib
import dis
import importlib.util
import math
import sys
from collections.abc import Iterator, Mapping
from types import CodeType, ModuleType
from typing import Any

import torch

from stitchcache.encoding import UnkeyableError
from stitchcache.keys import check, outside
from stitchcache.keys.origins import installed_path
from stitchcache.keys.outside import place
from stitchcache.keys.scope import WARM_CACHE, Scope
from stitchcache.keys.walk import Walk
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


class Reads:
    """What the model's code reads, noted while it runs. An entry is digested when it is met first.

    Args:
        keyed: What the target key of the same compilation was computed with.
        loaded: Names of the modules that were loaded before the capture.

    Attributes:
        found: Entries of the record, in the order in which they were met, with their digests.
        unsound: The first reason why a target key must not lead to this capture; ``None`` where it may.
        walk: What the digests of entries have in common; goes on from the key's walk.
        patched: Namespaces as they were before torch patches them for the time of a trace, by id.
    """

    def __init__(self, keyed: Scope, loaded: frozenset[str]) -> None:
        self.found: dict[str, str] = {}
        self.unsound: str | None = None
        self.walk = Walk(keyed)
        # torch.export replaces builtin min and max and math.pow while it traces, for its own ends.
        self.patched = {id(space): dict(space) for space in (vars(builtins), vars(math))}
        self._keyed = keyed
        self._loaded = loaded
        self._imports: list[tuple[Import, str]] = []
        self._module_classes: dict[int, type] = {}
        self._library_state: list[tuple[str, check.Found, list[Any]]] = []

    def refuse(self, reason: str) -> None:
        """Turn direct lookup off; the first reason is kept."""
        if self.unsound is None:
            self.unsound = reason

    def read_globals(self, code: CodeType, namespace: dict[str, Any], name: str) -> None:
        """Note the globals that code of a module reads, and what it imports."""
        label = self.label(name)
        for chain in global_chains(code):
            found = check.lookup(namespace, chain, self.patched)
            self._note(label, found, whole=found.used == chain)
        package = str(namespace.get("__package__") or name.rpartition(".")[0])
        for item in imports_of(code, package):
            self._imports.append((item, code.co_qualname))

    def read_cells(self, code: CodeType, cells: dict[str, Any]) -> None:
        """Note what code reads from modules that it closes over; the target key has their names only."""
        for chain in cell_chains(code):
            module = cells.get(chain[0])
            if len(chain) == 1 or not isinstance(module, ModuleType):
                continue
            if sys.modules.get(module.__name__) is not module:
                name = module.__name__
                self.refuse(f"{place(code)} reads from module {name}; put that in sys.modules")
                continue
            found = check.lookup(vars(module), chain[1:], self.patched)
            self._note(self.label(module.__name__), found, whole=found.used == chain[1:])

    def run_for(self, receiver: type) -> None:
        """Note the class whose method runs; those of modules are part of the target key already."""
        for cls in receiver.__mro__:
            if issubclass(cls, torch.nn.Module):
                self._module_classes[id(cls)] = cls
            elif not self.walk.is_versioned(cls.__module__):
                self.walk.note_class(cls)

    def finish(self, runs: Mapping[int, int]) -> None:
        """Note what shows at the end: imports, classes that were met, caches.

        Args:
            runs: How often code of the user's ran, by its id.
        """
        self._finish_imports()
        self._finish_classes()
        self._check_caches(runs)
        self._check_library_state()

    def _note(self, label: str, found: check.Found, *, whole: bool) -> None:
        late = "" if label == self.walk.main or label in self._loaded else "?"
        name = f"{late}{label}:{'.'.join(found.used)}{'' if whole else '.'}"
        # A module may have the name of a kind of entry.
        entry = f"global:{name}" if label in check.KINDS else name
        if entry in self.found or entry.rstrip(".") in check.ROLL_CALLS:
            return
        if entry.rstrip(".") in check.REGISTRIES and isinstance(found.value, dict):
            self._registry(entry.rstrip("."), found.value)
            return
        try:
            self.found[entry] = check.global_digest(self.walk, name, outside.as_before_trace(found))
        except UnkeyableError as error:
            self.refuse(str(error))
        if found.owner in sys.stdlib_module_names and isinstance(found.value, (list, dict, set)):
            self._library_state.append((entry, found, _parts(found.value)))

    def _check_library_state(self) -> None:
        """Refuse state of the library that torch changes meanwhile, such as the filters of warnings.

        Which of its values the model saw is not known then.
        """
        for entry, found, parts in self._library_state:
            now = getattr(sys.modules.get(found.owner), found.used[-1], None)
            new = _parts(now) if type(now) is type(found.value) else []
            if len(new) != len(parts) or any(a is not b for a, b in zip(new, parts, strict=True)):
                self.refuse(f"{check.title(entry)} changes while the model is captured; read it beforehand")

    def _registry(self, entry: str, registry: dict[Any, Any]) -> None:
        for key, item in registry.items():
            try:
                self.found[f"item:{entry}:{key}"] = check.item_digest(self.walk.main, item)
            except UnkeyableError as error:
                self.refuse(str(error))

    def _check_caches(self, runs: Mapping[int, int]) -> None:
        """Refuse a function that may have answered from its cache, so that its reads were not seen.

        Every call that a cache does not answer is a miss, so more misses than calls that were seen were made
        before the capture. Those of installed packages are left to the look.
        """
        for where, cached in (*self._keyed.caches, *self.walk.caches):
            code = getattr(cached.__wrapped__, "__code__", None)
            info = cached.cache_info()
            if info.currsize == 0 or (code is not None and any(self.walk.origin(code.co_filename))):
                continue
            if code is None or info.misses > runs.get(id(code), 0):
                self.refuse(f"{where} {WARM_CACHE}")

    def label(self, name: str) -> str:
        """A module under the name by which other processes would import it."""
        return self.walk.main if name == "__main__" else name

    def _finish_imports(self) -> None:
        for item, where in self._imports:
            module = sys.modules.get(item.module)
            if module is None and not self.walk.is_versioned(item.module):
                digest = check.import_digest(item.module, self.walk.main)
                if digest == check.text_digest(None):
                    self.found[f"import:{item.module}"] = digest
            if module is None or self.walk.is_versioned(item.module):
                continue
            for name in item.names:
                if name == "*":
                    self.refuse(f"{where} imports everything from {item.module}")
                elif name not in vars(module):
                    if item.exact and not installed_path(getattr(module, "__file__", None) or ""):
                        self.refuse(f"{where} imports {name} from {item.module}, which computes it")
                else:
                    found = check.Found(vars(module)[name], True, (name,))
                    self._note(self.label(item.module), found, whole=False)

    def _finish_classes(self) -> None:
        done: set[int] = set()
        while len(done) < len(self.walk.classes):
            for identity, cls in list(self.walk.classes.items()):
                if identity in done:
                    continue
                done.add(identity)
                label = self.label(cls.__module__)
                late = "" if label == self.walk.main or label in self._loaded else "?"
                try:
                    digest = check.class_digest(self.walk, cls)
                except UnkeyableError as error:
                    self.refuse(str(error))
                    continue
                self.found[f"class:{late}{label}:{cls.__qualname__}"] = digest
        covered = Walk()
        covered.codes = self.walk.codes
        for cls in self._module_classes.values():
            with contextlib.suppress(UnkeyableError):
                # The target key has met this class, or will; here it only says which code was digested.
                check.class_digest(covered, cls)


def _parts(value: Any) -> list[Any]:
    return [*value, *value.values()] if isinstance(value, dict) else list(value)
