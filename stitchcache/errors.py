"""Every error that stitchcache raises on purpose.

The tree (the builtin that each also derives from in brackets)::

    StitchCacheError
    |-- OptionError [ValueError]               an argument or option that makes no sense
    |-- TargetError [ValueError]               a prewarm target that cannot be used
    |   |-- TargetNotFoundError [LookupError]  no such module, file or name
    |   `-- DuplicateTargetError               two targets of one name
    |-- CaptureError [RuntimeError]            the model cannot be exported
    |   `-- ModelMismatchError                 what was captured does something else than the model
    |-- SplitError [ValueError]                the graph cannot be split
    |   `-- SplittingOpNotFoundError           a splitting op that is not in the graph
    |-- CodegenError [ValueError]              a graph that has no execution code
    |   `-- UnserializableConstError           a constant that cannot be stored
    |-- LinkError [LookupError]                code and pieces do not fit together
    |-- BindError [ValueError]                 model and artifact do not fit together
    |-- InputMismatchError [ValueError]        a call that the capture did not promise
    |-- BackendError [RuntimeError]            a piece cannot be compiled or loaded
    |   |-- CompilerMissingError               no C++ compiler
    |   |-- PieceCrashError                    a piece killed the child process that tried it
    |   |-- PieceMismatchError                 a piece disagrees with eager
    |   `-- EnvironmentMismatchError           compiled for another processor, GPU, libc or torch
    |-- StoreError [OSError]                   the store cannot be used as asked
    |   |-- StoreWriteError                    it cannot be written (read-only, full, foreign)
    |   `-- LockTimeoutError [TimeoutError]    another process held the lock for too long
    |-- EntryFormatError [ValueError]          bytes from outside that are not an entry
    |   |-- EntryDamagedError                  truncated or changed: a digest or a size is off
    |   |-- ForbiddenGlobalError               a consts table that names or calls what it may not
    |   `-- FutureFormatError                  written by a newer stitchcache
    |-- UntrustedEntryError [PermissionError]  native code that nobody vouches for
    |-- GraphHashError [LookupError]           a graph hash, or prefix of one, that names no entry
    |   `-- AmbiguousPrefixError               ... or more than one
    |-- CacheMissError [LookupError]           a miss where misses were forbidden
    `-- StaleEntryError [RuntimeError]         an audit found that a direct hit was wrong

Each carries its facts as attributes and survives pickling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def _rebuild(cls: type[StitchCacheError], message: str, facts: dict[str, Any]) -> StitchCacheError:
    return cls(message, **facts)


class StitchCacheError(Exception):
    """Base of every error raised on purpose.

    Args:
        message: What is wrong, where, and what to do about it.
        **facts: The same as data; each becomes an attribute.
    """

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.__dict__.update(facts)

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        facts = {k: v for k, v in self.__dict__.items() if k not in {"message", "__notes__"}}
        return _rebuild, (type(self), self.message, facts)


class OptionError(StitchCacheError, ValueError):
    """An argument, option or environment variable has a value that makes no sense.

    Attributes:
        option: Its name.
    """

    option: str = ""


class TargetError(StitchCacheError, ValueError):
    """A prewarm target cannot be used.

    Attributes:
        target: The target's name or reference.
    """

    target: str = ""


class TargetNotFoundError(TargetError, LookupError):
    """A reference such as ``pkg.module:name`` leads nowhere."""


class DuplicateTargetError(TargetError):
    """Two targets of one run have the same name."""


class CaptureError(StitchCacheError, RuntimeError):
    """The model cannot be captured as one graph.

    Attributes:
        reason: torch's own explanation, shortened.
        location: ``file:line`` of the user's code that stopped it, or ``""``.
    """

    reason: str = ""
    location: str = ""


class ModelMismatchError(CaptureError):
    """What was captured from a model does something else than the model.

    Attributes:
        output: The result or written tensor that differs, such as ``output['logits']`` or ``buffer:cache``.
        difference: Largest absolute difference; 0 where it is no matter of numbers.
        module: The first module whose result differs, with its class; ``""`` where none was found.
    """

    output: str = ""
    difference: float = 0.0
    module: str = ""


class SplitError(StitchCacheError, ValueError):
    """The graph cannot be split as asked."""


class SplittingOpNotFoundError(SplitError):
    """A splitting op does not occur in the graph.

    Attributes:
        op: The name that was asked for.
        present: The ops that are there, most frequent first.
    """

    op: str = ""
    present: Sequence[str] = ()


class CodegenError(StitchCacheError, ValueError):
    """A node has no form as source code.

    Attributes:
        node: The node's name, or ``""``.
    """

    node: str = ""


class UnserializableConstError(CodegenError):
    """An argument of a node can neither be written as a literal nor be pickled.

    Attributes:
        node: The node's name.
        path: Where in the node's arguments it stands, such as ``args[1]['scale']``.
        type_name: Its type.
    """

    path: str = ""
    type_name: str = ""


class LinkError(StitchCacheError, LookupError):
    """Execution code and pieces do not fit together.

    Attributes:
        missing: Names of submodules that the code calls and nobody supplied.
    """

    missing: Sequence[str] = ()


class BindError(StitchCacheError, ValueError):
    """A model does not have the parameters and buffers that an artifact was compiled for.

    Attributes:
        name: The parameter's or buffer's qualified name.
        expected: What the artifact needs.
        actual: What the model has.
    """

    name: str = ""
    expected: str = ""
    actual: str = ""


class InputMismatchError(StitchCacheError, ValueError):
    """A call's arguments are not what the capture promised.

    Attributes:
        argument: The argument, such as ``ids`` or ``batch['mask']``.
        expected: What the artifact was compiled for.
        actual: What came.
    """

    argument: str = ""
    expected: str = ""
    actual: str = ""


class BackendError(StitchCacheError, RuntimeError):
    """A backend cannot compile or load a piece.

    Attributes:
        backend: The backend's name.
        piece: The submodule's name, such as ``submod_0``.
    """

    backend: str = ""
    piece: str = ""


class CompilerMissingError(BackendError):
    """The backend needs a C++ compiler and found none."""


class PieceCrashError(BackendError):
    """A freshly compiled piece killed the child process that tried it.

    Attributes:
        exit_code: The child's exit status; negative is a signal.
    """

    exit_code: int = 0


class PieceMismatchError(BackendError):
    """A freshly compiled piece disagrees with eager execution.

    Attributes:
        difference: Largest absolute difference seen.
        tolerance: Largest that would have been accepted.
    """

    difference: float = 0.0
    tolerance: float = 0.0


class EnvironmentMismatchError(BackendError):
    """An entry was compiled for another environment; nothing of it was loaded.

    Attributes:
        factor: What differs, such as ``env.cpu``.
        expected: Its value where the entry was compiled; ``""`` where it was not recorded.
        actual: Its value here.
    """

    factor: str = ""
    expected: str = ""
    actual: str = ""


class StoreError(StitchCacheError, OSError):
    """The store cannot be used as asked.

    Attributes:
        path: The file or directory concerned.
    """

    path: str = ""


class StoreWriteError(StoreError):
    """The store cannot be written: read-only, full, or another user's.

    Attributes:
        reason: The operating system's words.
    """

    reason: str = ""


class LockTimeoutError(StoreError, TimeoutError):
    """Another process held a lock for longer than the caller would wait.

    Attributes:
        seconds: How long was waited.
    """

    seconds: float = 0.0


class EntryFormatError(StitchCacheError, ValueError):
    """Bytes from outside are not what the format says.

    Attributes:
        path: The file, or ``""`` for bytes in memory.
        field: The field within it, such as ``pieces[3].blob.digest``.
        reason: What is wrong with it.
    """

    path: str = ""
    field: str = ""
    reason: str = ""


class EntryDamagedError(EntryFormatError):
    """A file was truncated or changed: its size or digest is off."""


class ForbiddenGlobalError(EntryFormatError):
    """A consts table names, or calls, something that is not listed and not registered; nothing of it ran.

    Attributes:
        module: The module, as the table has it.
        name: The name in it.
    """

    module: str = ""
    name: str = ""


class FutureFormatError(EntryFormatError):
    """A newer stitchcache wrote this file; it is left alone.

    Attributes:
        version: The file's format version.
    """

    version: int = 0


class UntrustedEntryError(StitchCacheError, PermissionError):
    """A file holds native code and nobody vouches for it.

    Attributes:
        path: The file.
    """

    path: str = ""


class GraphHashError(StitchCacheError, LookupError):
    """A graph hash, or a prefix of one, names no entry.

    Attributes:
        prefix: What was asked for.
    """

    prefix: str = ""


class AmbiguousPrefixError(GraphHashError):
    """A prefix names more than one entry.

    Attributes:
        candidates: The graph hashes that it could mean.
    """

    candidates: Sequence[str] = ()


class CacheMissError(StitchCacheError, LookupError):
    """A miss where misses were forbidden.

    Attributes:
        target: The target's name or the model's class.
        key: The target key that was looked up, or ``""`` where there is none.
        reason: Why it is a miss.
        differences: Factor name to ``(value in the nearest entry, value now)``.
        changed: Source file to ``(digest when captured, digest now)``, for those that are not what they were.
    """

    target: str = ""
    key: str = ""
    reason: str = ""
    differences: Mapping[str, tuple[str, str]] = {}
    changed: Mapping[str, tuple[str, str]] = {}


class StaleEntryError(StitchCacheError, RuntimeError):
    """A hit was wrong: a look in the background, or an audit, found that it is not this model.

    Attributes:
        expected: Graph hash that was served, or that the target key led to.
        actual: Graph hash of the fresh trace; ``""`` where nothing was traced.
        differences: Factor of the graph to ``(in the entry, in the fresh trace)``.
        output: The result or written tensor that differed from the model's own; ``""`` after an audit.
        difference: By how much.
        caught: How many hits the look has found wrong in this cache, this one included.
    """

    expected: str = ""
    actual: str = ""
    differences: Mapping[str, tuple[str, str]] = {}
    output: str = ""
    difference: float = 0.0
    caught: int = 0
