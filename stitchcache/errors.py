"""Every error that stitchcache raises on purpose.

The tree (the builtin that each also derives from in brackets)::

    StitchCacheError
    |-- OptionError [ValueError]
    |-- TargetError [ValueError]: TargetNotFoundError [LookupError], DuplicateTargetError
    |-- CaptureError [RuntimeError]: ModelMismatchError
    |-- SplitError [ValueError]: SplittingOpNotFoundError
    |-- CodegenError [ValueError]: UnserializableConstError
    |-- LinkError [LookupError]
    |-- BindError [ValueError]
    |-- InputMismatchError [ValueError]
    |-- BackendError [RuntimeError]: CompilerMissingError, PieceCrashError, PieceMismatchError,
    |                                EnvironmentMismatchError
    |-- StoreError [OSError]: StoreWriteError, LockTimeoutError [TimeoutError]
    |-- EntryFormatError [ValueError]: EntryDamagedError, ForbiddenGlobalError, FutureFormatError
    |-- UntrustedEntryError [PermissionError]
    |-- GraphHashError [LookupError]: AmbiguousPrefixError
    |-- CacheMissError [LookupError]
    `-- StaleEntryError [RuntimeError]

Each carries its facts as attributes and survives pickling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self


def visible(text: str) -> str:
    """Text from anywhere with nothing in it that a terminal would act on; line breaks stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def printable(text: str) -> str:
    """The same with no line break: text from a file for a cell of a table, or a line of a log."""
    # Most text is, and a table has thousands of cells.
    return text if text.isprintable() else visible(text).replace("\n", "\\n")


class StitchCacheError(Exception):
    """Base of every error raised on purpose.

    Args:
        message: What is wrong, where, and what to do about it.
        **facts: The same as data; each becomes an attribute.
    """

    def __init__(self, message: str, **facts: Any) -> None:
        # It may quote what a file says.
        message = visible(message)
        super().__init__(message)
        self.message = message
        self.__dict__.update(facts)


class OptionError(StitchCacheError, ValueError):
    """An argument, option or environment variable has a value that makes no sense."""

    option: str = ""  # its name


def check_kind(name: str, value: object, kinds: Any, give: str) -> None:
    """Raise an ``OptionError`` for an argument of a wrong type; ``give`` is what to give: ``a dict``, say."""
    if not isinstance(value, kinds):
        raise OptionError(f"{name} is a {type(value).__qualname__}: give {give}.", option=name)


class TargetError(StitchCacheError, ValueError):
    """A prewarm target cannot be used."""

    target: str = ""  # its name or reference


class TargetNotFoundError(TargetError, LookupError):
    """A reference such as ``pkg.module:name`` leads nowhere."""


class DuplicateTargetError(TargetError):
    """Two targets of one run have the same name."""


class CaptureError(StitchCacheError, RuntimeError):
    """The model cannot be captured as one graph."""

    reason: str = ""  # torch's own explanation, shortened
    location: str = ""  # ``file:line`` of the user's code that stopped it


class ModelMismatchError(CaptureError):
    """What was captured from a model does something else than the model."""

    output: str = ""  # the result or written tensor that differs: ``output['logits']``, ``buffer:cache``
    difference: float = 0.0  # largest absolute difference; 0 where it is no matter of numbers
    module: str = ""  # the first module whose result differs, with its class


class SplitError(StitchCacheError, ValueError):
    """The graph cannot be split as asked."""


class SplittingOpNotFoundError(SplitError):
    """A splitting op does not occur in the graph."""

    op: str = ""  # the name that was asked for
    present: Sequence[str] = ()  # the ops that are there, most frequent first


class CodegenError(StitchCacheError, ValueError):
    """A node has no form as source code."""

    node: str = ""  # its name


class UnserializableConstError(CodegenError):
    """An argument of a node can neither be written as a literal nor be stored."""

    path: str = ""  # where in the node's arguments it stands, such as ``args[1]['scale']``
    type_name: str = ""


class LinkError(StitchCacheError, LookupError):
    """Execution code and pieces do not fit together."""

    missing: Sequence[str] = ()  # submodules that the code calls and nobody supplied


class BindError(StitchCacheError, ValueError):
    """A model does not have the parameters and buffers that an artifact was compiled for."""

    name: str = ""  # qualified name of the parameter or buffer
    expected: str = ""
    actual: str = ""


class InputMismatchError(StitchCacheError, ValueError):
    """A call's arguments are not what the capture promised."""

    argument: str = ""  # such as ``ids`` or ``batch['mask']``
    expected: str = ""
    actual: str = ""


class BackendError(StitchCacheError, RuntimeError):
    """A backend cannot compile or load a piece."""

    backend: str = ""
    piece: str = ""  # the submodule's name, such as ``submod_0``


class CompilerMissingError(BackendError):
    """The backend needs a C++ compiler and found none."""


class PieceCrashError(BackendError):
    """A freshly compiled piece killed the child process that tried it."""

    exit_code: int = 0  # negative is a signal


class PieceMismatchError(BackendError):
    """A freshly compiled piece disagrees with eager execution."""

    difference: float = 0.0  # largest absolute difference seen
    tolerance: float = 0.0  # largest that would have been accepted


class EnvironmentMismatchError(BackendError):
    """An entry was compiled for another processor, GPU, libc or torch; nothing of it was loaded."""

    factor: str = ""  # what differs, such as ``env.cpu``
    expected: str = ""  # its value where the entry was compiled; ``""`` where it was not recorded
    actual: str = ""


class StoreError(StitchCacheError, OSError):
    """The store cannot be used as asked."""

    path: str = ""


class StoreWriteError(StoreError):
    """The store cannot be written: read-only, full, or another user's."""

    reason: str = ""  # the operating system's words


class LockTimeoutError(StoreError, TimeoutError):
    """Another process held a lock for longer than the caller would wait."""

    seconds: float = 0.0  # how long was waited


class EntryFormatError(StitchCacheError, ValueError):
    """Bytes from outside are not what the format says."""

    path: str = ""  # the file; ``""`` for bytes in memory
    field: str = ""  # within it, such as ``pieces[3].blob.digest``
    reason: str = ""
    advice: str = ""  # what follows the reason in every message of the class

    @classmethod
    def at(cls, path: str, field: str, reason: str, **facts: Any) -> Self:
        """The error for a field of a file, or of bytes in memory if ``path`` is empty."""
        message = f"{path or 'entry'}: {field}: {reason}{cls.advice}"
        return cls(message, path=path, field=field, reason=reason, **facts)


class EntryDamagedError(EntryFormatError):
    """A file was truncated or changed: its size or digest is off."""

    advice = "; it was truncated or changed, and will be rebuilt"


class ForbiddenGlobalError(EntryFormatError):
    """A consts table names, or calls, something that is not listed and not registered; nothing of it ran."""

    module: str = ""  # as the table has it
    name: str = ""


class FutureFormatError(EntryFormatError):
    """A newer stitchcache wrote this file; it is left alone."""

    version: int = 0  # of its format
    advice = "; the file is left alone: upgrade stitchcache, or use another cache directory"


class UntrustedEntryError(StitchCacheError, PermissionError):
    """A file holds native code and nobody vouches for it."""

    path: str = ""


class GraphHashError(StitchCacheError, LookupError):
    """A graph hash, or a prefix of one, names no entry."""

    prefix: str = ""  # what was asked for


class AmbiguousPrefixError(GraphHashError):
    """A prefix names more than one entry."""

    candidates: Sequence[str] = ()  # the graph hashes that it could mean


class CacheMissError(StitchCacheError, LookupError):
    """A miss where misses were forbidden."""

    target: str = ""  # the target's name or the model's class
    key: str = ""  # the target key that was looked up, if there is one
    reason: str = ""
    differences: Mapping[str, tuple[str, str]] = {}  # factor to ``(value in the nearest entry, value now)``
    changed: Mapping[str, tuple[str, str]] = {}  # source file to ``(digest when captured, digest now)``


class StaleEntryError(StitchCacheError, RuntimeError):
    """A hit was wrong: a look in the background, or an audit, found that it is not this model."""

    expected: str = ""  # graph hash that was served, or that the target key led to
    actual: str = ""  # graph hash of the fresh trace; ``""`` where nothing was traced
    differences: Mapping[str, tuple[str, str]] = {}  # factor to ``(in the entry, in the fresh trace)``
    output: str = ""  # the result or written tensor that differed; ``""`` after an audit
    difference: float = 0.0
    caught: int = 0  # hits that the look has found wrong in this cache, this one included
