"""From source to a callable, bound to its pieces."""

from __future__ import annotations

import hashlib
import linecache
import marshal
import operator
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import MAGIC_NUMBER
from typing import Any

import torch

import stitchcache
from stitchcache.errors import LinkError


class CodeObjects:
    """Code objects of generated source, kept so that a warm start neither parses nor compiles it.

    A code object is named by a digest over everything that it comes from: the source, the name that
    tracebacks show, Python's bytecode version, and this package's version, for that decides what source is
    accepted at all. Any difference names another one, and then there is none: the source is read and
    checked as if nothing had been kept.

    Args:
        kept: Digest and marshalled code object, from bytes whose own digest was checked and that nobody else
            could have written.
    """

    def __init__(self, kept: Iterable[tuple[str, bytes]] = ()) -> None:
        self._kept = dict(kept)

    def get(self, filename: str, source: str) -> types.CodeType | None:
        """The code object of a source, if it is kept.

        Args:
            filename: What tracebacks show.
            source: The source, and what else the gate held it against.
        """
        kept = self._kept.get(_digest(filename, source))
        if kept is None:
            return None
        try:
            code = marshal.loads(kept)
        except (ValueError, EOFError, TypeError):
            return None
        return code if isinstance(code, types.CodeType) else None

    def add(self, filename: str, source: str, code: types.CodeType) -> None:
        """Keep a code object that was compiled from checked source."""
        self._kept[_digest(filename, source)] = marshal.dumps(code)

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """Digests and marshalled code objects, to be stored."""
        return iter(self._kept.items())


def _digest(filename: str, source: str) -> str:
    flags = f"{sys.flags.optimize} {sys.implementation.cache_tag} {MAGIC_NUMBER.hex()}"
    text = "\0".join((stitchcache.__version__, flags, filename, source))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def compile_execution_fn(
    code: str,
    submod_callables: Mapping[str, Any],
    submod_names: Sequence[str],
    consts: Sequence[Any] | None = None,
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
        consts: Constants in the order in which the code expects them.

    Returns:
        A function over the graph's placeholders, in graph order.

    Raises:
        EntryFormatError: The code is not of the shape that the generators write, or does not fit the
            number of submodules or constants.
        LinkError: The code uses a submodule that is not supplied, or an op that does not exist here.
    """
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
    table = list(consts) if consts is not None else []
    submods = [submod_callables.get(name) for name in submod_names] if isinstance(code, str) else []
    # Anything but text is refused by the gate.
    filename = _name_of(code) if isinstance(code, str) else ""
    # What the gate held the source against is a part of what names the code object.
    checked_as = f"{len(submod_names)} {len(table)}\0{code}"
    kept = objects.get(filename, checked_as)
    function = None
    if kept is not None and all(submod is not None for submod in submods):
        function = _bind(kept, submods, table)
    if function is None:
        function = _bind_checked(code, filename, submod_names, submods, table, objects, checked_as)
    show_source(function, filename, code)
    return function


def _name_of(code: str) -> str:
    return f"<stitchcache {hashlib.sha256(code.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}>"


def _bind(kept: types.CodeType, submods: list[Any], consts: list[Any]) -> types.FunctionType | None:
    """Run a kept code object; ``None`` where it needs what this process lacks, which the gate can name."""
    scope = _scope()
    try:
        exec(kept, scope)  # noqa: S102  (it passed the gate when it was compiled)
        function: types.FunctionType = scope["bind"](submods, consts)
    except AttributeError:
        return None
    return function


def _bind_checked(
    code: str,
    filename: str,
    submod_names: Sequence[str],
    submods: list[Any],
    consts: list[Any],
    objects: CodeObjects,
    checked_as: str,
) -> types.FunctionType:
    # Imported where it is needed: most warm starts find the code object.
    from stitchcache.codegen.gate import check_code

    checked = check_code(code, len(submod_names), len(consts))
    missing = [name for i, name in enumerate(submod_names) if i in checked.used and submods[i] is None]
    if missing:
        raise LinkError(
            f"The execution code uses {', '.join(missing)}, and nothing was supplied for it. "
            "Pass a callable (or a tensor, for a parameter or buffer) under each name in submod_callables.",
            missing=missing,
        )
    scope = _scope()
    compiled = compile(checked.tree, filename, "exec", dont_inherit=True)
    function: types.FunctionType
    if checked.abi == "bound":
        exec(compiled, scope)  # noqa: S102  (after the gate)
        objects.add(filename, checked_as, compiled)
        function = scope["bind"](submods, consts)
    else:
        scope["__vllm_consts__"] = consts
        exec(compiled, scope)  # noqa: S102  (after the gate)
        function = scope["execution_fn"]
        function.__kwdefaults__ = {**(function.__kwdefaults__ or {}), "__vllm_submods__": submods}
    return function


def _scope() -> dict[str, Any]:
    # The gate took the import statements out: what they would bind is given here.
    return {
        "__name__": "stitchcache.generated",
        "torch": torch,
        "operator": operator,
        "_operator": operator,
    }


class _Source(list[str]):
    """Source lines in linecache, with the functions that still need them.

    linecache is where tracebacks look, and the only place that all functions of equal code share; so
    the count is kept there, on the lines themselves.
    """

    def __init__(self, code: str) -> None:
        super().__init__(code.splitlines(keepends=True))
        self.users: set[object] = set()


def show_source(function: types.FunctionType, filename: str, code: str) -> None:
    """Show a generated function's source in tracebacks while it, or another one of equal code, lives."""
    entry = linecache.cache.get(filename)
    source = (
        entry[2] if entry is not None and len(entry) == 4 and isinstance(entry[2], _Source) else _Source(code)
    )
    user = object()
    source.users.add(user)
    # No modification time: linecache then never compares it with a file.
    linecache.cache[filename] = (len(code), None, source, filename)
    weakref.finalize(function, _hide_source, filename, source, user).atexit = False


def _hide_source(filename: str, source: _Source, user: object) -> None:
    source.users.discard(user)
    entry = linecache.cache.get(filename)
    if source.users or entry is None or len(entry) != 4 or entry[2] is not source:
        return
    linecache.cache.pop(filename, None)
    if source.users:  # another thread compiled equal code meanwhile
        linecache.cache[filename] = entry
