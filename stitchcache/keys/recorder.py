"""Watches a capture: which code runs, and what that code reads from outside of the model.

A profile function sees every call in the thread. ``sys.monitoring`` would be cheaper where it exists, but it
gives code objects without their globals, and to switch off a place after its first call, which makes it
cheap, would miss a second function with the same code and other globals, or a method with another class.
Capture takes seconds; the profile function is paid only there.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import logging
import math
import os
import sys
from collections.abc import Callable
from types import CodeType, FrameType, ModuleType
from typing import Any

import torch

from stitchcache.encoding import UnkeyableError
from stitchcache.keys import check, outside, reads
from stitchcache.keys.familiar import FamiliarCalls
from stitchcache.keys.origins import (
    changed_since_import,
    installed_path,
    process_start,
    read_source,
    stands_by_version,
)
from stitchcache.keys.outside import is_search, place, receiver_of
from stitchcache.keys.scope import WARM_CACHE, Scope
from stitchcache.keys.walk import Walk
from stitchcache.torchside.state import active_modes
from stitchcache.types import SourceRef

_READ_VARIABLE = type(os.environ).__getitem__.__code__
_HANDLE_LOG = logging.Logger.callHandlers.__code__
_DYNAMO = f"{os.sep}torch{os.sep}_dynamo{os.sep}symbolic_convert.py"
_BUILTINS = vars(builtins)


class SourceRecorder(contextlib.AbstractContextManager["SourceRecorder"]):
    """Records what a capture depends on beyond the model itself. Use it around the capture, in its thread.

    Args:
        keyed: What the target key of the same compilation was computed with: functions that it digested, with
            what they close over, such as a model's hooks, need no digest here.

    Attributes:
        sources: Source files that ran, after the block.
        globals: What the code read, after the block: name to digest. See docs/keys.md for the names.
        unsound: Why a target key must not lead to this capture; ``None`` where it may.
    """

    def __init__(self, keyed: Scope | None = None) -> None:
        self._keyed = keyed or Walk()
        self.sources: tuple[SourceRef, ...] = ()
        self.globals: tuple[tuple[str, str], ...] = ()
        self.unsound: str | None = None
        self._shared = Walk(self._keyed)
        self._seen: dict[int, CodeType] = {}
        self._met: dict[tuple[int, int, int], tuple[Any, type | None]] = {}
        self._user: dict[int, CodeType] = {}
        self._modules: dict[str, ModuleType] = {}
        self._found: dict[str, str] = {}
        self._imports: list[tuple[reads.Import, str]] = []
        self._module_classes: dict[int, type] = {}
        self._loaded: frozenset[str] = frozenset()
        self._previous: Any = None
        self._bystanders: dict[int, CodeType] = {}
        self._watched: dict[int, CodeType] = {}
        self._asked: dict[int, tuple[str, Any]] = {}
        self._answers: set[str] = set()
        self._runs: dict[int, int] = {}
        self._generated: set[int] = set()
        self._patched: dict[int, dict[str, Any]] = {}
        self._library_state: list[tuple[str, check.Found, list[Any]]] = []
        self._callback: Callable[[FrameType, str, Any], None] | None = None
        self._noticed = 0
        self._unwatched = contextlib.ExitStack()

    def __enter__(self) -> SourceRecorder:
        self._loaded = frozenset(sys.modules)
        # torch.export replaces builtin min and max and math.pow while it traces, for its own ends.
        self._patched = {id(space): dict(space) for space in (_BUILTINS, vars(math))}
        self._asked = outside.asked_functions()
        watched = [*outside.FORBIDDEN_CODE, *(thing for _, thing in self._asked.values())]
        self._watched = {id(code): code for code in watched}
        # What a program does with log records, or when memory is collected, is no part of its models.
        on_collect = (getattr(callback, "__code__", None) for callback in gc.callbacks)
        self._bystanders = {id(code): code for code in (_HANDLE_LOG, *on_collect) if code is not None}
        self._previous = sys.getprofile()
        self._callback = self._profiler()
        # Modes of somebody else's would see what is asked of a call's arguments.
        if not active_modes():
            self._unwatched.enter_context(FamiliarCalls(self._callback, lambda: self._noticed))
        sys.setprofile(self._callback)
        return self

    def __exit__(self, *exc: object) -> None:
        intact = sys.getprofile() is self._callback
        sys.setprofile(self._previous)
        self._unwatched.close()
        if not intact:
            self._refuse("another profiler was installed while the model was captured")
        self._finish_imports()
        self._finish_classes()
        self._check_caches()
        self._check_library_state()
        self._found |= {entry: check.answer_digest(entry) for entry in self._answers}
        self._check_covered()
        self.sources = tuple(self._sources())
        # In the order in which they were read: an object that two of them share is written with the first.
        self.globals = tuple(self._found.items())
        self._callback = self._previous = None

    @property
    def codes(self) -> list[CodeType]:
        """Code that ran, but that of torch and of the standard library."""
        return list(self._user.values())

    def _refuse(self, reason: str) -> None:
        if self.unsound is None:
            self.unsound = reason

    def _profiler(self) -> Callable[[FrameType, str, Any], None]:
        """What Python calls on every call and return: millions of times for a deep model.

        A closure, because looking up attributes would take most of its time. ``quiet`` has the code that was
        met before and that nobody needs to hear of again.
        """
        quiet: set[int] = set()
        user, system, bystanders, watched = self._user, outside.SYSTEM, self._bystanders, self._watched
        runs = self._runs
        muted: FrameType | None = None

        def profile(frame: FrameType, event: str, arg: Any) -> None:
            nonlocal muted
            if muted is not None:
                if event == "return" and frame is muted:
                    muted = None
            elif event == "c_call":
                if id(arg) in system or id(frame.f_code) in user:
                    self._call_in_c(frame, arg)
            elif event == "call":
                code = frame.f_code
                identity = id(code)
                if identity in quiet:
                    return
                if identity in bystanders:
                    muted = frame
                    return
                if code is _READ_VARIABLE:
                    self._variable(frame)
                if identity not in self._seen:
                    self._seen[identity] = code
                    self._first_call(frame, code)
                elif identity in user:
                    self._further_call(frame, code)
                if identity in user:
                    self._noticed += 1
                    runs[identity] = runs.get(identity, 0) + 1
                if identity in watched:
                    self._forbidden_code(frame, code)
                elif identity not in user and code is not _READ_VARIABLE:
                    quiet.add(identity)

        return profile

    def _call_in_c(self, frame: FrameType, function: Any) -> None:
        if id(frame.f_code) in self._user:
            self._noticed += 1
            self._c_call(frame.f_code, function)
        elif id(function) in outside.SYSTEM and (caller := outside.on_behalf_of(frame)) is not None:
            self._noticed += 1
            self._refuse(
                f"{place(caller.f_code)} makes the library call {function.__name__}, which asks the system"
            )

    def _first_call(self, frame: FrameType, code: CodeType) -> None:
        filename = code.co_filename
        if stands_by_version(filename):
            if filename in outside.WATCHED_FILES or (code.co_name == "run" and filename.endswith(_DYNAMO)):
                self._watched[id(code)] = code
            return
        if filename.startswith("<") and (id(code) in self._generated or self._is_generated(frame)):
            self._generated |= {id(const) for const in code.co_consts if isinstance(const, CodeType)}
            return
        if is_search(frame):
            return
        if frame.f_builtins is not _BUILTINS:
            self._refuse(f"{place(code)} has builtins of its own; define it in a module that is imported")
        if self._meet(code, frame.f_globals):
            self._further_call(frame, code)

    def _meet(self, code: CodeType, namespace: dict[str, Any]) -> bool:
        """Note code of the user's; ``False`` if its globals are not those of a module."""
        self._user[id(code)] = code
        if outside.sees_namespaces(code):
            self._refuse(f"{place(code)} looks into a namespace as a whole; name what is read from it")
        if not check.is_module_namespace(namespace):
            # Its bytecode may be part of a digest, which is looked at when everything was seen. Its globals
            # never are: no name leads to them in another process.
            for chain in reads.global_chains(code):
                if chain[0] in namespace and not outside.is_given(code, chain[0], namespace[chain[0]]):
                    self._refuse(
                        f"{place(code)} reads {chain[0]} from globals that belong to no imported module; "
                        "define it in a module, and put that in sys.modules"
                    )
            return False
        name = str(namespace["__name__"])
        self._modules.setdefault(name, sys.modules[name])
        if name not in self._loaded and not installed_path(code.co_filename):
            self._refuse(f"module {name} is imported while the model runs; import it beforehand")
        return True

    def _further_call(self, frame: FrameType, code: CodeType) -> None:
        """Look again where a function has other globals than before, or a method another class."""
        namespace, receiver = frame.f_globals, receiver_of(frame, code)
        key = (id(code), id(namespace), id(receiver))
        if key in self._met:
            return
        self._met[key] = (namespace, receiver)
        if code.co_name == "<module>" or not check.is_module_namespace(namespace):
            return
        name = str(namespace["__name__"])
        self._modules.setdefault(name, sys.modules[name])
        self._reads(code, namespace, name)
        if code.co_freevars:
            self._cells(code, frame.f_locals)
        if receiver is not None:
            self._receiver(receiver)

    def _is_generated(self, frame: FrameType) -> bool:
        """Whether code without a file is made by torch or the library, such as a namedtuple's constructor.

        A body that they execute only defines functions; those are looked at when they run.
        """
        module = str(frame.f_globals.get("__name__"))
        if module.startswith("namedtuple_"):
            return True
        if check.is_module_namespace(frame.f_globals) and self._shared.is_versioned(module):
            return True
        caller = frame.f_back
        body = frame.f_code.co_name == "<module>"
        return body and caller is not None and stands_by_version(caller.f_code.co_filename)

    def _reads(self, code: CodeType, namespace: dict[str, Any], name: str) -> None:
        label = self._label(name)
        for chain in reads.global_chains(code):
            found = check.lookup(namespace, chain, self._patched)
            self._note(label, found, whole=found.used == chain)
        package = str(namespace.get("__package__") or name.rpartition(".")[0])
        for item in reads.imports_of(code, package):
            self._imports.append((item, code.co_qualname))

    def _cells(self, code: CodeType, cells: dict[str, Any]) -> None:
        """Note what code reads from modules that it closes over; the target key has their names only."""
        for chain in reads.cell_chains(code):
            module = cells.get(chain[0])
            if len(chain) == 1 or not isinstance(module, ModuleType):
                continue
            if sys.modules.get(module.__name__) is not module:
                name = module.__name__
                self._refuse(f"{place(code)} reads from module {name}; put that in sys.modules")
                continue
            found = check.lookup(vars(module), chain[1:], self._patched)
            self._note(self._label(module.__name__), found, whole=found.used == chain[1:])

    def _note(self, label: str, found: check.Found, *, whole: bool) -> None:
        late = "" if label == self._shared.main or label in self._loaded else "?"
        name = f"{late}{label}:{'.'.join(found.used)}{'' if whole else '.'}"
        # A module may have the name of a kind of entry.
        entry = f"global:{name}" if label in check.KINDS else name
        if entry in self._found or entry.rstrip(".") in check.ROLL_CALLS:
            return
        if entry.rstrip(".") in check.REGISTRIES and isinstance(found.value, dict):
            self._registry(entry.rstrip("."), found.value)
            return
        try:
            self._found[entry] = check.global_digest(self._shared, name, outside.as_before_trace(found))
        except UnkeyableError as error:
            self._refuse(str(error))
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
                self._refuse(f"{check.title(entry)} changes while the model is captured; read it beforehand")

    def _registry(self, entry: str, registry: dict[Any, Any]) -> None:
        for key, item in registry.items():
            try:
                self._found[f"item:{entry}:{key}"] = check.item_digest(self._shared.main, item)
            except UnkeyableError as error:
                self._refuse(str(error))

    def _check_caches(self) -> None:
        """Refuse a function that may have answered from its cache, so that its reads were not seen.

        Every call that a cache does not answer is a miss, so more misses than calls that were seen were made
        before the capture. Those of installed packages are left to the look.
        """
        for where, cached in (*self._keyed.caches, *self._shared.caches):
            code = getattr(cached.__wrapped__, "__code__", None)
            info = cached.cache_info()
            if info.currsize == 0 or (code is not None and any(self._shared.origin(code.co_filename))):
                continue
            if code is None or info.misses > self._runs.get(id(code), 0):
                self._refuse(f"{where} {WARM_CACHE}")

    def _receiver(self, receiver: type) -> None:
        """Note the class whose method runs; those of modules are part of the target key already."""
        for cls in receiver.__mro__:
            if issubclass(cls, torch.nn.Module):
                self._module_classes[id(cls)] = cls
            elif not self._shared.is_versioned(cls.__module__):
                self._shared.note_class(cls)

    def _variable(self, frame: FrameType) -> None:
        """Note an environment variable that the model's code reads; torch's are factors where they count."""
        caller = outside.outside_stdlib(frame)
        if caller is None:
            return
        key = frame.f_locals.get("key")
        if isinstance(key, bytes):
            key = key.decode("utf-8", "surrogateescape")
        if stands_by_version(caller.f_code.co_filename) and key not in outside.OF_A_PROCESS:
            return
        self._noticed += 1
        if isinstance(key, str):
            data = key.encode("utf-8", "surrogateescape")
            value = os.environ._data.get(data)  # type: ignore[attr-defined]
            text = None if value is None else value.decode("utf-8", "surrogateescape")
            self._found.setdefault(f"env:{key}", check.text_digest(text))

    def _forbidden_code(self, frame: FrameType, code: CodeType) -> None:
        if code.co_filename.endswith(_DYNAMO):
            self._traced_by_dynamo(frame.f_locals.get("self"))
            return
        caller = outside.outside_stdlib(frame)
        filename = "" if caller is None else caller.f_code.co_filename
        if caller is not None and stands_by_version(filename) and self._on_behalf(code):
            # torch asks for the rank, say, for a module that the model is made of.
            filename = ""
        lazily = code is outside.IMPORT_MODULE and installed_path(filename)
        if caller is None or stands_by_version(filename) or lazily:
            return
        self._noticed += 1
        asked = self._asked.get(id(code))
        if asked is not None:
            given = [value for value in frame.f_locals.values() if value is not None]
            self._ask(asked[0], plain=not given, where=caller.f_code)
            return
        why = (
            outside.FORBIDDEN_CODE.get(code)
            or f"calls {code.co_qualname}, whose result is not the same each time"
        )
        self._refuse(f"{place(caller.f_code)} {why}")

    def _on_behalf(self, code: CodeType) -> bool:
        """Whether it matters, also where torch itself asks it: which process of many this one is."""
        entry = self._asked.get(id(code), ("", None))[0]
        return entry.startswith("call:torch.distributed:") and not entry.endswith(":is_available")

    def _traced_by_dynamo(self, translator: Any) -> None:
        """Note a function whose bytecode torch._dynamo reads instead of running it: a branch of torch.cond.

        What it reads is known from its code as for any other. What it would call in C is not
        seen, so that is looked for among its globals, too.
        """
        code, namespace = getattr(translator, "f_code", None), getattr(translator, "f_globals", None)
        if not isinstance(code, CodeType) or not isinstance(namespace, dict):
            self._refuse("part of the model is traced by torch._dynamo, whose reads are not seen")
            return
        if stands_by_version(code.co_filename):
            return
        self._noticed += 1
        self._seen[id(code)] = code
        if not self._meet(code, namespace):
            return
        name = str(namespace["__name__"])
        self._reads(code, namespace, name)
        for chain in reads.global_chains(code):
            value = check.lookup(namespace, chain, self._patched).value
            why = outside.forbidden_to_dynamo(code, value)
            if why is None and id(getattr(value, "__code__", value)) in self._asked:
                why = f"asks {chain[-1]}()"
            if why is not None:
                self._refuse(f"{place(code)} {why} where torch._dynamo traces; do so outside of the branch")

    def _ask(self, entry: str, *, plain: bool, where: CodeType) -> None:
        """Note a function of torch whose answer the model's code uses."""
        if plain:
            self._answers.add(entry)
        else:
            self._refuse(f"{place(where)} calls {check.title(entry)[5:]} with arguments; call it beforehand")

    def _c_call(self, code: CodeType, function: Any) -> None:
        """Look at what the model's code calls in C: clocks, files and random numbers are in no key."""
        asked = self._asked.get(id(function))
        if asked is not None:
            self._ask(asked[0], plain=True, where=code)
            return
        module = outside.module_of(function)
        reason = outside.forbidden_call(code, function)
        if reason is not None:
            self._refuse(f"{place(code)} {reason}")
        elif module is not None and module not in self._modules:
            extension = sys.modules.get(module)
            file = getattr(extension, "__file__", None) or ""
            if extension is not None and file.endswith((".so", ".pyd")) and not stands_by_version(file):
                self._modules[module] = extension

    def _label(self, name: str) -> str:
        return self._shared.main if name == "__main__" else name

    def _finish_imports(self) -> None:
        for item, where in self._imports:
            module = sys.modules.get(item.module)
            if module is None and not self._shared.is_versioned(item.module):
                digest = check.import_digest(item.module, self._shared.main)
                if digest == check.text_digest(None):
                    self._found[f"import:{item.module}"] = digest
            if module is None or self._shared.is_versioned(item.module):
                continue
            for name in item.names:
                if name == "*":
                    self._refuse(f"{where} imports everything from {item.module}")
                elif name not in vars(module):
                    if item.exact and not installed_path(getattr(module, "__file__", None) or ""):
                        self._refuse(f"{where} imports {name} from {item.module}, which computes it")
                else:
                    found = check.Found(vars(module)[name], True, (name,))
                    self._note(self._label(item.module), found, whole=False)

    def _finish_classes(self) -> None:
        done: set[int] = set()
        while len(done) < len(self._shared.classes):
            for identity, cls in list(self._shared.classes.items()):
                if identity in done:
                    continue
                done.add(identity)
                label = self._label(cls.__module__)
                late = "" if label == self._shared.main or label in self._loaded else "?"
                try:
                    digest = check.class_digest(self._shared, cls)
                except UnkeyableError as error:
                    self._refuse(str(error))
                    continue
                self._found[f"class:{late}{label}:{cls.__qualname__}"] = digest
        covered = Walk()
        covered.codes = self._shared.codes
        for cls in self._module_classes.values():
            with contextlib.suppress(UnkeyableError):
                # The target key has met this class, or will; here it only says which code was digested.
                check.class_digest(covered, cls)

    def _check_covered(self) -> None:
        """Refuse code that no digest stands for: made by exec, or reached with cells nobody wrote down."""
        constants = (const for code in self._seen.values() for const in code.co_consts)
        nested = {id(const) for const in constants if isinstance(const, CodeType)}
        files = {getattr(module, "__file__", None) for module in self._modules.values()}
        for identity, code in self._user.items():
            if identity in self._shared.codes or identity in self._keyed.codes or identity in nested:
                continue
            if os.path.abspath(code.co_filename) not in files:
                self._refuse(f"{place(code)} has no source file that can be checked")
            elif set(code.co_freevars) - {"__class__"}:
                self._refuse(f"{place(code)} was reached in a way that hides what it closes over")

    def _sources(self) -> list[SourceRef]:
        found = []
        started = process_start()
        for name, module in sorted(self._modules.items()):
            label = self._label(name)
            if label == "__main__" and getattr(module, "__file__", None) is None:
                continue
            try:
                data = read_source(module)
            except OSError as error:
                self._refuse(f"the source of {name} cannot be read: {error}")
                continue
            file = getattr(module, "__file__", None)
            ran = [code for code in self._user.values() if code.co_filename == file]
            # Hundreds of functions of an installed package may have run; nobody edits those in place.
            reason = changed_since_import(module, data, started, () if installed_path(file or "") else ran)
            if reason is not None:
                self._refuse(reason)
            found.append(SourceRef(module=label, digest=check.bytes_digest(data), size=len(data)))
        return found


def _parts(value: Any) -> list[Any]:
    return [*value, *value.values()] if isinstance(value, dict) else list(value)
