"""Watches a capture: which code runs, and what that code reads from outside of the model."""

from __future__ import annotations

import builtins
import contextlib
import gc
import logging
import os
import sys
import types
from typing import Any

from stitchcache.keys import bytecode, check, events, reads
from stitchcache.keys.bytecode import place
from stitchcache.keys.check import changed_since_import, read_file
from stitchcache.keys.walk import Walk, installed_path, stands_by_version
from stitchcache.torchside import GUARD
from stitchcache.types import SourceRef

_READ_VARIABLE = type(os.environ).__getitem__.__code__
_HANDLE_LOG = logging.Logger.callHandlers.__code__
_DYNAMO = f"{os.sep}torch{os.sep}_dynamo{os.sep}symbolic_convert.py"
_BUILTINS = vars(builtins)


class SourceRecorder(contextlib.AbstractContextManager["SourceRecorder"]):
    """Records what a capture depends on beyond the model itself. Use it around the capture, in its thread.

    ``keyed`` is the walk of the same compilation's target key: what it digested needs no digest here. After
    the block, ``sources`` has the files that ran, ``globals`` what the code read, and ``unsound`` the reason
    why a target key must not lead to this capture.
    """

    def __init__(self, keyed: Walk | None = None) -> None:
        self._keyed = keyed or Walk()
        self.sources: tuple[SourceRef, ...] = ()
        self.globals: tuple[tuple[str, str], ...] = ()
        self.unsound: str | None = None
        self.seen: dict[int, types.CodeType] = {}
        self._met: dict[tuple[int, int, int], tuple[Any, type | None]] = {}
        self.user: dict[int, types.CodeType] = {}
        self._modules: dict[str, types.ModuleType] = {}
        self._runs: dict[int, int] = {}
        self._generated: set[int] = set()
        self._muted: types.FrameType | None = None
        # How much there was to look at so far.
        self.noticed = 0

    def __enter__(self) -> SourceRecorder:
        self._reads = reads.Reads(self._keyed)
        self.refuse = self._reads.refuse
        self._asked = reads.asked_functions()
        watched = [*reads.FORBIDDEN_CODE, *(thing for _, thing in self._asked.values())]
        self._watched = {id(code): code for code in watched}
        # What a program does with log records, or when memory is collected, is no part of its models.
        on_collect = (getattr(callback, "__code__", None) for callback in gc.callbacks)
        self._bystanders = {id(code): code for code in (_HANDLE_LOG, *on_collect) if code is not None}
        self._told = contextlib.ExitStack()
        self._told.enter_context(events.told(self))
        return self

    def __exit__(self, *exc: object) -> None:
        self._told.close()
        self._muted = None
        self._reads.finish(self._runs)
        self._check_covered()
        self.sources = tuple(self._sources())
        self.globals, self.unsound = tuple(self._reads.found.items()), self._reads.unsound

    @property
    def codes(self) -> list[types.CodeType]:
        """Code that ran, but that of torch and of the standard library."""
        return list(self.user.values())

    def started(self, frame: types.FrameType, code: types.CodeType) -> bool:
        """Look at code that begins to run, or goes on; ``True`` if it need not be shown again."""
        identity = id(code)
        if self._is_muted(frame):
            return False
        if identity in self._bystanders:
            self._muted = frame
            return False
        if code is _READ_VARIABLE:
            self._variable(frame)
        if identity not in self.seen:
            self.seen[identity] = code
            self._first_call(frame, code)
        elif identity in self.user:
            self._further_call(frame, code)
        if identity in self.user:
            self.noticed += 1
            self._runs[identity] = self._runs.get(identity, 0) + 1
        if identity in self._watched:
            self._watched_code(frame, code)
            return False
        return identity not in self.user and code is not _READ_VARIABLE

    def called(self, frame: types.FrameType, function: Any) -> None:
        """Look at a function made in C before code of the user's calls it, or the library asks the system."""
        if not self._is_muted(frame):
            self._call_in_c(frame, function)

    def _is_muted(self, frame: types.FrameType) -> bool:
        """Whether a frame runs below code of a bystander's."""
        if self._muted is None:
            return False
        if any(caller is self._muted for caller in reads.callers(frame)):
            return True
        self._muted = None
        return False

    def _first_call(self, frame: types.FrameType, code: types.CodeType) -> None:
        filename = code.co_filename
        if stands_by_version(filename):
            if filename in reads.WATCHED_FILES or (code.co_name == "run" and filename.endswith(_DYNAMO)):
                self._watched[id(code)] = code
            return
        if filename.startswith("<") and (id(code) in self._generated or self._is_generated(frame)):
            self._generated |= {id(const) for const in code.co_consts if isinstance(const, types.CodeType)}
            return
        if not reads.is_search(frame):
            self._meet(code, frame.f_globals)
            self._further_call(frame, code)

    def _is_generated(self, frame: types.FrameType) -> bool:
        """Whether code without a file is made by torch or the library, such as a namedtuple's constructor."""
        module = str(frame.f_globals.get("__name__"))
        of_library = reads.is_module_namespace(frame.f_globals) and self._keyed.is_versioned(module)
        if of_library or module.startswith("namedtuple_") or frame.f_code.co_qualname.startswith(GUARD):
            return True
        # A body that they execute only defines functions; those are looked at when they run.
        caller = frame.f_back
        body = frame.f_code.co_name == "<module>"
        return body and caller is not None and stands_by_version(caller.f_code.co_filename)

    def _meet(self, code: types.CodeType, namespace: dict[str, Any]) -> None:
        """Note code of the user's that was not met before."""
        self.user[id(code)] = code
        if reason := bytecode.asks_unknown(code):
            self.refuse(f"{place(code)} {reason}")
        name = str(namespace.get("__name__"))
        known = name in self._reads.loaded or installed_path(code.co_filename)
        if reads.is_module_namespace(namespace) and not known:
            self.refuse(f"module {name} is imported while the model runs; import it beforehand")

    def _read_globals(self, code: types.CodeType, namespace: dict[str, Any]) -> bool:
        """Note what code reads; ``False`` if its globals are no module's: no name leads to them elsewhere."""
        if reads.is_module_namespace(namespace):
            name = str(namespace["__name__"])
            self._modules.setdefault(name, sys.modules[name])
            if code.co_name != "<module>":
                self._reads.read_globals(code, namespace, name)
            return True
        for chain, _ in bytecode.chains(code):
            if chain[0] in namespace and not reads.is_given(code, chain[0], namespace[chain[0]]):
                self.refuse(
                    f"{place(code)} reads {chain[0]} from globals that belong to no imported module; "
                    "define it in a module, and put that in sys.modules"
                )
        return False

    def _further_call(self, frame: types.FrameType, code: types.CodeType) -> None:
        namespace, receiver = frame.f_globals, bytecode.receiver_of(frame, code)
        key = (id(code), id(namespace), id(receiver))
        # A function may have other globals than before, or a method another class.
        if key in self._met:
            return
        self._met[key] = (namespace, receiver)
        if frame.f_builtins is not _BUILTINS:
            self.refuse(f"{place(code)} has builtins of its own; define it in a module that is imported")
        if not self._read_globals(code, namespace) or code.co_name == "<module>":
            return
        if code.co_freevars:
            self._reads.read_cells(code, frame.f_locals)
        if receiver is not None:
            self._reads.run_for(receiver)

    def _variable(self, frame: types.FrameType) -> None:
        """Note an environment variable that the model's code reads; torch's are factors where they count."""
        caller = reads.outside_stdlib(frame)
        if caller is None:
            return
        key = frame.f_locals.get("key")
        if isinstance(key, bytes):
            key = os.fsdecode(key)
        if stands_by_version(caller.f_code.co_filename) and key not in reads.OF_A_PROCESS:
            return
        self.noticed += 1
        if isinstance(key, str):
            # Nothing is watched within the profile function, so this is not seen as a read of the model's.
            self._reads.found.setdefault(f"env:{key}", check.text_digest(os.environ.get(key)))

    def _watched_code(self, frame: types.FrameType, code: types.CodeType) -> None:
        if code.co_filename.endswith(_DYNAMO):
            self._traced_by_dynamo(frame.f_locals.get("self"))
            return
        caller = reads.outside_stdlib(frame)
        if caller is None:
            return
        entry = self._asked.get(id(code), ("", None))[0]
        filename = caller.f_code.co_filename
        # torch asks for the rank, say, for a module that the model is made of: which process of many this is.
        rank = entry.startswith("call:torch.distributed:") and not entry.endswith(":is_available")
        lazily = code is reads.IMPORT_MODULE and installed_path(filename)
        if lazily or (stands_by_version(filename) and not rank):
            return
        self.noticed += 1
        if entry:
            given = [value for value in frame.f_locals.values() if value is not None]
            if given:
                name = check.title(entry.partition(":")[2])
                self.refuse(f"{place(caller.f_code)} calls {name} with arguments; call it beforehand")
            else:
                self._reads.answers[entry] = None
            return
        calls = f"calls {code.co_qualname}, whose result is not the same each time; call it beforehand"
        self.refuse(f"{place(caller.f_code)} {reads.FORBIDDEN_CODE.get(code, calls)}")

    def _traced_by_dynamo(self, translator: Any) -> None:
        """Note a function that torch._dynamo reads instead of running it: a branch of torch.cond.

        What it would call in C is not seen, so that is looked for among its globals.
        """
        code, namespace = getattr(translator, "f_code", None), getattr(translator, "f_globals", None)
        if not isinstance(code, types.CodeType) or not isinstance(namespace, dict):
            self.refuse("torch._dynamo traces a part of the model, which is not seen; use plain branches")
            return
        if stands_by_version(code.co_filename):
            return
        self.noticed += 1
        self.seen[id(code)] = code
        self._meet(code, namespace)
        if not self._read_globals(code, namespace):
            return
        for chain, _ in bytecode.chains(code):
            value = check.lookup(namespace, chain, self._reads.patched).value
            why = reads.forbidden_to_dynamo(code, value)
            if why is None and id(getattr(value, "__code__", value)) in self._asked:
                why = f"asks {chain[-1]}()"
            if why is not None:
                said = why.partition(";")[0]
                self.refuse(f"{place(code)} {said} where torch._dynamo traces; do so outside of the branch")

    def _call_in_c(self, frame: types.FrameType, function: Any) -> None:
        """Look at what is called in C: clocks, files and random numbers are in no key."""
        code = frame.f_code
        if id(code) not in self.user:
            caller = reads.on_behalf_of(frame)
            if caller is not None:
                self.noticed += 1
                said = f"makes the library call {function.__name__}, which asks the system; ask beforehand"
                self.refuse(f"{place(caller.f_code)} {said}")
            return
        self.noticed += 1
        asked = self._asked.get(id(function))
        reason = reads.forbidden_call(code, function)
        module = reads.module_of(function)
        if asked is not None:
            self._reads.answers[asked[0]] = None
        elif reason is not None:
            self.refuse(f"{place(code)} {reason}")
        elif module is not None and module not in self._modules:
            extension = sys.modules.get(module)
            file = getattr(extension, "__file__", None) or ""
            if extension is not None and file.endswith((".so", ".pyd")) and not stands_by_version(file):
                self._modules[module] = extension

    def _check_covered(self) -> None:
        """Refuse code that no digest stands for: made by exec, or reached with cells nobody wrote down."""
        constants = (const for code in self.seen.values() for const in code.co_consts)
        nested = {id(const) for const in constants if isinstance(const, types.CodeType)}
        files = {getattr(module, "__file__", None) for module in self._modules.values()}
        for identity, code in self.user.items():
            if identity in self._keyed.codes or identity in nested:
                continue
            if os.path.abspath(code.co_filename) not in files:
                self.refuse(f"{place(code)} has no source file that can be checked; define it in a module")
            elif set(code.co_freevars) - {"__class__"}:
                hidden = "was reached in a way that hides what it closes over; hold it on the model"
                self.refuse(f"{place(code)} {hidden}")

    def _sources(self) -> list[SourceRef]:
        found = []
        for name, module in sorted(self._modules.items()):
            label, file = self._keyed.label(name), getattr(module, "__file__", None)
            if label == "__main__" and file is None:
                continue
            try:
                data = read_file(file or "", module)
            except OSError as error:
                self.refuse(f"the source of {name} cannot be read: {error}; run it from a file")
                continue
            # Hundreds of functions of an installed package may have run; nobody edits those in place.
            own = [code for code in self.user.values() if code.co_filename == file]
            ran = [] if installed_path(file or "") else own
            reason = changed_since_import(module, data, self._keyed.started, ran)
            if reason is not None:
                self.refuse(reason)
            found.append(SourceRef(module=label, digest=check.bytes_digest(data), size=len(data)))
        return found
