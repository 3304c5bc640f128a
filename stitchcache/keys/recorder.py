"""Watches a capture: which code runs, and what that code reads from outside of the model.

A profile function sees every call in the thread. ``sys.monitoring`` would be cheaper where it exists, but it
gives code objects without their globals, and to switch off a place after its first call, which makes it
cheap, would miss a second function with the same code and other globals, or a method with another class.
Capture takes seconds; the profile function is paid only there.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import sys
from collections.abc import Callable
from types import CodeType, FrameType, ModuleType
from typing import Any

import torch

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
from stitchcache.keys.values import Shared, UnkeyableError
from stitchcache.torchside.state import active_modes
from stitchcache.types import SourceRef

_READ_VARIABLE = type(os.environ).__getitem__.__code__
_CACHED = type(functools.lru_cache(lambda: None))
_HANDLE_LOG = logging.Logger.callHandlers.__code__
_DYNAMO = f"{os.sep}torch{os.sep}_dynamo{os.sep}symbolic_convert.py"


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

    def __init__(self, keyed: Shared | None = None) -> None:
        self._keyed = keyed or Shared()
        self.sources: tuple[SourceRef, ...] = ()
        self.globals: tuple[tuple[str, str], ...] = ()
        self.unsound: str | None = None
        self._shared = Shared()
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
        self._callback: Callable[[FrameType, str, Any], None] | None = None
        self._noticed = 0
        self._unwatched = contextlib.ExitStack()

    def __enter__(self) -> SourceRecorder:
        self._loaded = frozenset(sys.modules)
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
        self._found |= {entry: check.answer_digest(entry) for entry in self._answers}
        self._check_covered()
        self.sources = tuple(self._sources())
        self.globals = tuple(sorted(self._found.items()))
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
            if filename in outside.WATCHED_FILES:
                self._watched[id(code)] = code
            if code.co_name == "run" and filename.endswith(_DYNAMO):
                self._refuse("part of the model is traced by torch._dynamo, whose reads are not seen")
            return
        namespace = frame.f_globals
        if filename.startswith("<") and self._is_generated(frame):
            return
        if is_search(frame):
            return
        self._user[id(code)] = code
        if outside.sees_namespaces(code):
            self._refuse(f"{place(code)} looks into a namespace as a whole; name what is read from it")
        if not check.is_module_namespace(namespace):
            # Covered only if its bytecode is part of a digest; looked at when everything was seen.
            return
        name = str(namespace["__name__"])
        module = sys.modules[name]
        self._modules.setdefault(name, module)
        if name not in self._loaded and not installed_path(filename):
            self._refuse(f"module {name} is imported while the model runs; import it beforehand")
        self._further_call(frame, code)

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
        if receiver is not None:
            self._receiver(receiver)

    def _is_generated(self, frame: FrameType) -> bool:
        """Whether code without a file is made by torch or the library, such as a namedtuple's constructor.

        A body that they execute only defines functions; those are looked at when they run.
        """
        module = str(frame.f_globals.get("__name__"))
        if module.startswith("namedtuple_") or self._shared.is_versioned(module):
            return True
        caller = frame.f_back
        body = frame.f_code.co_name == "<module>"
        return body and caller is not None and stands_by_version(caller.f_code.co_filename)

    def _reads(self, code: CodeType, namespace: dict[str, Any], name: str) -> None:
        label = self._label(name)
        for chain in reads.global_chains(code):
            found = check.lookup(namespace, chain)
            self._note(label, found, whole=found.used == chain)
        package = str(namespace.get("__package__") or name.rpartition(".")[0])
        for item in reads.imports_of(code, package):
            self._imports.append((item, code.co_qualname))

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
        if isinstance(found.value, _CACHED) and self._hides_calls(found.value):
            self._refuse(
                f"{label}.{'.'.join(found.used)} has results from before the capture in its lru_cache, "
                "and how they came about was not seen; call its cache_clear() before compiling"
            )
        try:
            self._found[entry] = check.global_digest(self._shared, name, found)
        except UnkeyableError as error:
            self._refuse(str(error))

    def _registry(self, entry: str, registry: dict[Any, Any]) -> None:
        for key, item in registry.items():
            try:
                self._found[f"item:{entry}:{key}"] = check.item_digest(self._shared.main, item)
            except UnkeyableError as error:
                self._refuse(str(error))

    def _hides_calls(self, cached: Any) -> bool:
        """Whether a function with a cache may answer without being run, so that its reads go unseen."""
        code = getattr(cached.__wrapped__, "__code__", None)
        if code is None or id(code) in self._seen or installed_path(code.co_filename):
            return False
        return not stands_by_version(code.co_filename) and cached.cache_info().currsize > 0

    def _receiver(self, receiver: type) -> None:
        """Note the class whose method runs; those of modules are part of the target key already."""
        for cls in receiver.__mro__:
            if issubclass(cls, torch.nn.Module):
                self._module_classes[id(cls)] = cls
            elif not self._shared.is_versioned(cls.__module__):
                self._shared.classes.setdefault(id(cls), cls)

    def _variable(self, frame: FrameType) -> None:
        """Note an environment variable that the model's code reads; torch's are factors where they count."""
        caller = outside.outside_stdlib(frame)
        if caller is None or stands_by_version(caller.f_code.co_filename):
            return
        self._noticed += 1
        key = frame.f_locals.get("key")
        if isinstance(key, bytes):
            key = key.decode("utf-8", "surrogateescape")
        if isinstance(key, str):
            data = key.encode("utf-8", "surrogateescape")
            value = os.environ._data.get(data)  # type: ignore[attr-defined]
            text = None if value is None else value.decode("utf-8", "surrogateescape")
            self._found.setdefault(f"env:{key}", check.text_digest(text))

    def _forbidden_code(self, frame: FrameType, code: CodeType) -> None:
        caller = outside.outside_stdlib(frame)
        filename = "" if caller is None else caller.f_code.co_filename
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
        covered = Shared(main=self._shared.main, codes=self._shared.codes)
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
            reason = changed_since_import(module, data, started)
            if reason is not None:
                self._refuse(reason)
            found.append(SourceRef(module=label, digest=check.bytes_digest(data), size=len(data)))
        return found
