"""What generated code takes from outside: submodules, constants and ops."""

from __future__ import annotations

import pickle
from typing import Any, Literal

from stitchcache.codegen.names import Namespace, is_identifier
from stitchcache.codegen.reach import BUILTINS, Path, path_of
from stitchcache.errors import UnserializableConstError

# What pickling refuses with, by itself and through an object's own __reduce__ or __getstate__.
_REFUSALS = (
    pickle.PicklingError,
    TypeError,
    AttributeError,
    ValueError,
    LookupError,
    NotImplementedError,
    RecursionError,
    RuntimeError,
    OSError,
)


class _Discard:
    def write(self, data: Any, /) -> int:
        return len(data)


class Bindings:
    """The slots of one generated function, in order of first use.

    Args:
        namespace: Where the names in the code come from.
        abi: How the code spells a slot.

    Attributes:
        slots: Qualified name of each submodule, parameter and buffer, to its source text.
        ops: Dotted path of each op to its source text.
        consts: The constants.
        const_text: Identity of each constant to its source text.
    """

    def __init__(self, namespace: Namespace, abi: Literal["bound", "list"]) -> None:
        self._namespace = namespace
        self._abi = abi
        self.const_text: dict[int, str] = {}
        self._callables: dict[int, str | None] = {}
        self.slots: dict[str, str] = {}
        self.ops: dict[Path, str] = {}
        self.consts: list[Any] = []

    def slot(self, qualified_name: str) -> str:
        """Take a submodule, parameter or buffer by its name below the root; gives its source text."""
        if qualified_name not in self.slots:
            if self._abi == "list":
                self.slots[qualified_name] = f"__vllm_submods__[{len(self.slots)}]"
            else:
                # bind() reads builtins after it has named its slots: `op_0 = max` must mean the builtin.
                wanted = f"{qualified_name}_" if qualified_name in BUILTINS else qualified_name
                self.slots[qualified_name] = self._namespace.take(wanted)
        return self.slots[qualified_name]

    def const(self, value: Any, node: str, path: str) -> str:
        """Take a constant, the argument of a node that stands at ``path``; gives its source text.

        Two arguments share a slot when they are the same object, whatever ``==`` says of them.

        Raises:
            UnserializableConstError: It cannot be pickled.
        """
        if id(value) not in self.const_text:
            _check_picklable(value, node, path)
            index = len(self.consts)
            self.consts.append(value)
            self.const_text[id(value)] = (
                f"__vllm_consts__[{index}]" if self._abi == "list" else self._namespace.take_numbered("const")
            )
        return self.const_text[id(value)]

    def callable(self, target: Any, node: str, path: str) -> str:
        """Take a function, op, method or class; gives the source text of an op, or else of a constant.

        Raises:
            UnserializableConstError: No dotted name leads to it and it cannot be pickled.
        """
        if id(target) not in self._callables:
            found = path_of(target)
            self._callables[id(target)] = None if found is None else self.op(*found)
        name = self._callables[id(target)]
        return self.const(target, node, path) if name is None else name

    def op(self, *path: str) -> str:
        """Take what a dotted path leads to; gives its source text."""
        if path not in self.ops:
            self.ops[path] = dotted(path) if self._abi == "list" else self._namespace.take_numbered("op")
        return self.ops[path]


def dotted(path: Path) -> str:
    """Write a dotted path as source, through ``getattr`` where a step is no identifier."""
    text = path[0]
    for step in path[1:]:
        text = f"{text}.{step}" if is_identifier(step) else f"getattr({text}, {step!a})"
    return text


def _check_picklable(value: Any, node: str, path: str) -> None:
    """Refuse a constant that could not be stored, while its node is still known."""
    try:
        pickle.Pickler(_Discard(), protocol=4).dump(value)
    except _REFUSALS as error:
        kind = type(value)
        type_name = f"{kind.__module__}.{kind.__qualname__}"
        raise UnserializableConstError(
            f"{node}: {path} is a {type_name}, which cannot be stored: {error}. "
            "Pass it to the graph as an input, or replace it by something that pickles, "
            "such as a function or class at the top level of a module.",
            node=node,
            path=path,
            type_name=type_name,
        ) from error
