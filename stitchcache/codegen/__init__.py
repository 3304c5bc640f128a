"""From source to a callable, bound to its pieces. Writing source (``generate``) is imported by name only."""

from __future__ import annotations

import hashlib
import linecache
import marshal
import operator
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import MAGIC_NUMBER
from typing import Any

import torch

import stitchcache
from stitchcache.errors import EntryFormatError, LinkError


class CodeObjects:
    """Code objects of generated source, kept so that a warm start neither parses nor compiles it.

    One is named by a digest over everything that it comes from: the source, the name that tracebacks show,
    Python's bytecode version, and this package's version, which decides what source is accepted. Where
    anything differs none is found, and the source is read and checked as if nothing had been kept.

    Args:
        kept: Digest and marshalled code object, from bytes whose own digest was checked and that nobody else
            could have written.
    """

    def __init__(self, kept: Iterable[tuple[str, bytes]] = ()) -> None:
        self._kept = dict(kept)

    def get(self, filename: str, source: str) -> types.CodeType | None:
        """The code object of a source (with what else the gate held it against), if it is kept."""
        kept = self._kept.get(_digest(filename, source), b"N")
        if kept[:1] not in (b"c", b"\xe3") or not _claims_fit(kept):
            # What is a code object, and all there, is as trusted as a piece.
            return None
        try:
            code = marshal.loads(kept)
        except (ValueError, EOFError, TypeError, SystemError):
            return None
        return code if isinstance(code, types.CodeType) else None

    def add(self, filename: str, source: str, code: types.CodeType) -> None:
        """Keep a code object that was compiled from checked source."""
        self._kept[_digest(filename, source)] = marshal.dumps(code)

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """Digests and marshalled code objects, to be stored."""
        return iter(self._kept.items())


# What marshal writes of a code object: the bytes of each kind of object, or those of the length before its
# bytes or items. Python 3.11 to 3.14 agree.
_FIXED = {**dict.fromkeys(b"NTFS.", 0), **dict.fromkeys(b"ir", 4), ord("g"): 8, ord("y"): 16}
_MEASURED = {**dict.fromkeys(b"zZ)", 1), **dict.fromkeys(b"sutaAl(>", 4)}
_BEFORE, _PARTS, _LINE, _TABLES = 20, 8, 4, 2  # of a code object: numbers, objects, a number, objects


def _claims_fit(data: bytes) -> bool:
    """Whether a marshalled code object is as long as the lengths in it say.

    Reading one makes room for all items that a tuple claims before it looks for them.
    """
    at, owed, todo = 0, 1, [1]
    while todo:
        count = todo.pop()
        if count <= 0:  # bytes between objects
            at -= count
            continue
        todo.append(count - 1)
        owed -= 1
        kind = data[at] & 0x7F if at < len(data) else 0  # the highest bit only says that it is named
        at += 1
        if kind == ord("c"):
            at += _BEFORE
            todo += (_TABLES, -_LINE, _PARTS)
            owed += _PARTS + _TABLES
        elif kind in _FIXED:
            at += _FIXED[kind]
        elif kind in _MEASURED:
            length = int.from_bytes(data[at : at + _MEASURED[kind]], "little")
            at += _MEASURED[kind]
            if kind in b"()>":
                todo.append(length)
                owed += length
            else:  # digits of a number have two bytes, and its sign is that of their number
                at += 2 * min(length, (1 << 32) - length) if kind == ord("l") else length
        else:
            return False
        if owed > len(data) - at:  # an object has a byte at least
            return False
    return at == len(data)


def _digest(filename: str, source: str) -> str:
    flags = f"{sys.flags.optimize} {sys.implementation.cache_tag} {MAGIC_NUMBER.hex()}"
    return _sha256("\0".join((stitchcache.__version__, flags, filename, source)))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def compile_execution_fn(
    code: str,
    submod_callables: Mapping[str, Any],
    submod_names: Sequence[str],
    consts: Sequence[Any] | bytes | None = None,
) -> Callable[..., Any]:
    """Turn execution code into a function that is bound to its pieces.

    Takes what `generate_execution_code` returns, in this process or another one, and likewise what
    vLLM's generator returns. The code is checked before any of it runs. Its source is found by
    tracebacks, ``inspect`` and ``pdb`` for as long as the function lives.

    Args:
        code: Source of the stitching function.
        submod_callables: The callable of each submodule and the tensor of each parameter or buffer,
            by name; names that the code does not use may be missing.
        submod_names: Names in the order in which the code expects them.
        consts: Constants in the order in which the code expects them: a list, or the pickled list that
            `Artifact.consts` is.

    Returns:
        A function over the graph's placeholders, in graph order.

    Raises:
        EntryFormatError: The code is not of the shape that the generators write, or does not fit the
            number of submodules or constants; or ``consts`` are bytes that are no table of constants.
        LinkError: The code uses a submodule that is not supplied, or an op that does not exist here.
    """
    if isinstance(consts, bytes):
        # Most callers have the list, and what reads a table is one of the larger modules.
        from stitchcache.artifact.consts import load_consts

        consts = load_consts(consts)
    return bind_execution_fn(code, submod_callables, submod_names, consts, CodeObjects())


def bind_execution_fn(
    code: str,
    submod_callables: Mapping[str, Any],
    submod_names: Sequence[str],
    consts: Sequence[Any] | None,
    objects: CodeObjects,
) -> Callable[..., Any]:
    """`compile_execution_fn`, with code objects that are kept.

    Source whose code object is there was checked when that was made, against the same numbers of submodules
    and constants, and is not parsed again. What is compiled here is added to ``objects``.
    """
    if not isinstance(code, str):
        raise EntryFormatError("The code is not text.", field="code", reason=f"it is a {type(code).__name__}")
    table = list(consts) if consts is not None else []
    submods = [submod_callables.get(name) for name in submod_names]
    missing = {index for index, submod in enumerate(submods) if submod is None}
    filename = f"<stitchcache {_sha256(code)[:16]}>"
    checked_as = f"{len(submods)} {len(table)}\0{code}"
    compiled = objects.get(filename, checked_as) if not missing else None
    function = None
    if compiled is not None:
        # It may need an op that this process lacks: the gate says which.
        with suppress(AttributeError):
            function = _run(compiled, submods, table)
    if function is None:
        # Imported where it is needed: most warm starts find the code object.
        from stitchcache.codegen.gate import check_code

        tree, is_bound, used = check_code(code, len(submods), len(table))
        absent = [submod_names[index] for index in sorted(missing & used)]
        if absent:
            raise LinkError(
                f"The execution code uses {', '.join(absent)}, and nothing was supplied for it. "
                "Pass a callable (or a tensor, for a parameter or buffer) under each name.",
                missing=absent,
            )
        compiled = compile(tree, filename, "exec", dont_inherit=True)
        if is_bound:  # the list ABI looks its ops up on each call, so a lack would show too late
            objects.add(filename, checked_as, compiled)
        function = _run(compiled, submods, table)
    show_source(function, filename, code)
    return function


def _run(compiled: types.CodeType, submods: list[Any], consts: list[Any]) -> types.FunctionType:
    """Run source that passed the gate, which took its imports out: what they would bind is given here."""
    scope: dict[str, Any] = {"__name__": "stitchcache.generated", "torch": torch, "__vllm_consts__": consts}
    scope["operator"] = scope["_operator"] = operator
    exec(compiled, scope)  # noqa: S102  (after the gate)
    function: types.FunctionType
    if "bind" in scope:
        del scope["__vllm_consts__"]  # only the function holds them: `bind` and these names are a circle
        function = scope["bind"](submods, consts)
    else:
        function = scope["execution_fn"]
        function.__kwdefaults__ = {**(function.__kwdefaults__ or {}), "__vllm_submods__": submods}
    return function


class _Source(list[str]):
    """Source lines in linecache, which all functions of equal code share, with those that still need them."""

    users: set[object]


def show_source(function: types.FunctionType, filename: str, code: str) -> None:
    """Show a generated function's source in tracebacks while it, or another one of equal code, lives."""
    source = _shown(filename)
    if source is None:
        source = _Source(code.splitlines(keepends=True))
        source.users = set()
    user = object()
    source.users.add(user)
    # No modification time: linecache then never compares it with a file.
    linecache.cache[filename] = (len(code), None, source, filename)
    weakref.finalize(function, _hide_source, filename, source, user).atexit = False


def _shown(filename: str) -> _Source | None:
    entry = linecache.cache.get(filename)
    return entry[2] if entry is not None and len(entry) == 4 and isinstance(entry[2], _Source) else None


def _hide_source(filename: str, source: _Source, user: object) -> None:
    source.users.discard(user)
    if source.users or _shown(filename) is not source:
        return
    entry = linecache.cache.pop(filename)
    if source.users:  # another thread compiled equal code meanwhile
        linecache.cache[filename] = entry
