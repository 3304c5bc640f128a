"""From source to a callable, bound to its pieces."""

from __future__ import annotations

import hashlib
import linecache
import operator
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from stitchcache.codegen.gate import CheckedCode, check_code
from stitchcache.errors import LinkError


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
    table = list(consts) if consts is not None else []
    checked = check_code(code, len(submod_names), len(table))
    missing = [
        name
        for i, name in enumerate(submod_names)
        if i in checked.used and submod_callables.get(name) is None
    ]
    if missing:
        raise LinkError(
            f"The execution code uses {', '.join(missing)}, and nothing was supplied for it. "
            "Pass a callable (or a tensor, for a parameter or buffer) under each name in submod_callables.",
            missing=missing,
        )
    submods = [submod_callables.get(name) for name in submod_names]
    filename = f"<stitchcache {hashlib.sha256(code.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}>"
    function = _execute(checked, filename, submods, table)
    _show_source(function, filename, code)
    return function


def _execute(
    checked: CheckedCode, filename: str, submods: list[Any], consts: list[Any]
) -> types.FunctionType:
    # The gate took the import statements out: what they would bind is given here.
    scope: dict[str, Any] = {
        "__name__": "stitchcache.generated",
        "torch": torch,
        "operator": operator,
        "_operator": operator,
    }
    if checked.abi == "list":
        scope["__vllm_consts__"] = consts
    exec(compile(checked.tree, filename, "exec", dont_inherit=True), scope)  # noqa: S102  (after the gate)
    function: types.FunctionType
    if checked.abi == "bound":
        function = scope["bind"](submods, consts)
    else:
        function = scope["execution_fn"]
        function.__kwdefaults__ = {**(function.__kwdefaults__ or {}), "__vllm_submods__": submods}
    return function


class _Source(list[str]):
    """Source lines in linecache, with the functions that still need them.

    linecache is where tracebacks look, and the only place that all functions of equal code share; so
    the count is kept there, on the lines themselves.
    """

    def __init__(self, code: str) -> None:
        super().__init__(code.splitlines(keepends=True))
        self.users: set[object] = set()


def _show_source(function: types.FunctionType, filename: str, code: str) -> None:
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
