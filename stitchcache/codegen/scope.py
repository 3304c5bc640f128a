"""What generated code names (values, slots, constants, ops), and how arguments are written with the names."""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.immutable_collections import immutable_dict, immutable_list

from stitchcache.codegen.reach import BUILTINS, Path, is_identifier, path_of
from stitchcache.errors import CodegenError, UnserializableConstError
from stitchcache.torchside.ops import SYMBOLIC, constant_of, expression
from stitchcache.types import BOUND

# Names that generated code gives a meaning of its own; no value may take them.
_RESERVED = frozenset({
    "__consts__", "__debug__", "__submods__", "__vllm_consts__", "__vllm_submods__", "_", "_operator", "bind",
    "execution_fn", "getattr", "operator", "torch",
})  # fmt: skip
_MAX_DEPTH = 60  # Python's parser gives up at 200 nested brackets, and a call level can take three.
# repr of an int beyond this many bits may hit the interpreter's limit on decimal digits; hex never does.
_DECIMAL_BITS = 128
# What pickling refuses with, by itself and through an object's own __reduce__ or __getstate__.
_REFUSALS = (pickle.PicklingError, TypeError, AttributeError, ValueError, LookupError, RuntimeError, OSError)


def literal(value: object) -> str | None:
    """Write a scalar as source text; ``None`` for what has no literal."""
    # Exact types: an enum or numpy.float64 has a repr of its own. inf and nan would be names.
    # ASCII: it does not depend on the interpreter's Unicode tables.
    kind = type(value)
    if value is None or value is Ellipsis or kind is bool:
        return "..." if value is Ellipsis else repr(value)
    if isinstance(value, int) and kind is int:
        return repr(value) if value.bit_length() <= _DECIMAL_BITS else hex(value)
    if isinstance(value, float) and kind is float:
        return repr(value) if math.isfinite(value) else None
    return ascii(value) if kind is str or kind is bytes else None


def variable(name: str) -> str:
    """Write the value of this name in an expression, to be replaced by the variable that it will live in."""
    return f"\0{name}\0"  # no other text has this character, as literals are written with escapes


class Scope:
    """What the names of one generated function mean; slots, ops and constants in order of first use."""

    def __init__(self) -> None:
        self._taken = set(_RESERVED)
        self._next: dict[tuple[str, int], int] = {}
        self._callables: dict[int, Path | None] = {}
        self._symbols: dict[Any, Node] = {}
        self.slots: dict[str, str] = {}  # qualified name of a submodule, parameter or buffer to its text
        self.ops: dict[Path, str] = {}
        self.consts: list[Any] = []
        self.const_texts: dict[int, str] = {}  # by identity
        self.values: dict[Node, str] = {}  # with variables as `variable` writes them

    def take(self, wanted: str) -> str:
        """Take a name, or the nearest legal one that was not handed out before."""
        name = re.sub(r"[^A-Za-z0-9_]+", "_", wanted)
        # Two underscores in front are the ABI's own.
        if name.startswith("__") or name in ("", "_"):
            name = name.strip("_") or "value"
        name = f"_{name}" if name[0].isdigit() else name
        name = name if is_identifier(name) else f"{name}_"
        if name in self._taken:
            return self._numbered(name, 1)
        self._taken.add(name)
        return name

    def _numbered(self, prefix: str, first: int = 0) -> str:
        # The next number is remembered for each series: a thousand equal names stay linear.
        number = self._next.get((prefix, first), first)
        while f"{prefix}_{number}" in self._taken:
            number += 1
        self._next[prefix, first] = number + 1
        self._taken.add(f"{prefix}_{number}")
        return f"{prefix}_{number}"

    def define(self, node: Node, text: str) -> None:
        """Say what the value of a node is called."""
        self.values[node] = text
        value = node.meta.get("val", node.meta.get("example_value"))
        if isinstance(value, SYMBOLIC):
            self._symbols.setdefault(expression(value), node)

    def slot(self, name: str) -> str:
        """Take a submodule, parameter or buffer by its name below the root; gives its source text."""
        if name not in self.slots:
            # bind() reads builtins after it has named its slots: `op_0 = max` must mean the builtin.
            wanted = name.removeprefix(f"{BOUND}.")
            wanted = f"{wanted}_" if wanted in BUILTINS else wanted
            self.slots[name] = self.take(wanted)
        return self.slots[name]

    def op(self, *path: str) -> str:
        """Take what a dotted path leads to; gives its source text."""
        if path not in self.ops:
            # An overload's name says little: torch.ops.aten.mul.Tensor is op_mul.
            name = path[3] if path[:2] == ("torch", "ops") and len(path) > 3 else path[-1]
            self.ops[path] = self.take(f"op_{name}")
        return self.ops[path]

    def const(self, value: Any, node: Node, path: str) -> str:
        """Take a constant, which stands at ``path`` in a node's arguments; gives its source text.

        Two arguments share a slot when they are the same object, whatever ``==`` says of them.
        """
        if id(value) not in self.const_texts:
            _check_picklable(value, node, path)
            self.const_texts[id(value)] = self._numbered("const")
            self.consts.append(value)
        return self.const_texts[id(value)]

    def op_or_const(self, value: Any, node: Node, path: str) -> str:
        """Take an op, function or class by a dotted path, and what none leads to as a constant."""
        if id(value) not in self._callables:
            self._callables[id(value)] = path_of(value)
        found = self._callables[id(value)]
        return self.const(value, node, path) if found is None else self.op(*found)

    def call(
        self, node: Node, function: str, args: Sequence[Any], kwargs: Mapping[str, Any], first: int = 0
    ) -> str:
        """Write a call; ``first`` is the number of its first argument in those of the node."""
        parts = [self.text(node, arg, f"args[{i}]") for i, arg in enumerate(args, first)]
        rest: list[str] = []
        for key, value in kwargs.items():
            text = self.text(node, value, f"kwargs[{key!r}]")
            # Once one needs a dict the others follow it there, so that the order stays.
            if rest or not is_identifier(key):
                rest.append(f"{key!a}: {text}")
            else:
                parts.append(f"{key}={text}")
        if rest:
            parts.append("**{" + ", ".join(rest) + "}")
        return f"{function}({', '.join(parts)})"

    def index(self, node: Node, arg: Any) -> str:
        """Write what stands between subscript brackets, where slices have a form of their own."""
        parts = [
            self._slice(node, part) if isinstance(part, slice) else self.text(node, part, "args[1]")
            for part in (arg if type(arg) is tuple and arg else (arg,))
        ]
        return ", ".join(parts) + ("," if type(arg) is tuple and len(arg) == 1 else "")

    def _slice(self, node: Node, arg: slice) -> str:
        bounds = (arg.start, arg.stop, arg.step)
        start, stop, step = ("" if b is None else self.text(node, b, "args[1]") for b in bounds)
        return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"

    def text(self, node: Node, arg: Any, path: str, depth: int = 0) -> str:
        """Write an argument of a node, which stands at ``path`` in so many containers, as source text."""
        if isinstance(arg, Node):
            if arg not in self.values:
                raise refusal(node, path, f"is the value of {arg.name}, which is not computed before.")
            return self.values[arg]
        text = literal(arg)
        if text is not None:
            return text
        if depth > _MAX_DEPTH:
            raise refusal(node, path, f"is nested more than {_MAX_DEPTH} levels deep.")

        def joined(items: Sequence[Any], steps: Sequence[str]) -> str:
            pairs = zip(items, steps, strict=True)
            return ", ".join(self.text(node, item, f"{path}{step}", depth + 1) for item, step in pairs)

        kind = type(arg)
        if kind is dict or kind is immutable_dict:
            keys = [self.text(node, key, f"{path}.keys()", depth + 1) for key in arg]
            steps = [f"[{literal(key) or type(key).__name__}]" for key in arg]
            items = [joined([item], [step]) for item, step in zip(arg.values(), steps, strict=True)]
            return "{" + ", ".join(map(": ".join, zip(keys, items, strict=True))) + "}"
        if kind in (list, tuple, immutable_list):
            text = joined(arg, [f"[{i}]" for i in range(len(arg))])
            return f"({text}{',' if len(arg) == 1 else ''})" if kind is tuple else f"[{text}]"
        if isinstance(arg, (slice, range)):
            parts = joined((arg.start, arg.stop, arg.step), (".start", ".stop", ".step"))
            return f"{self.op(kind.__name__)}({parts})"
        if isinstance(arg, tuple) and hasattr(kind, "_fields"):
            steps = [f".{name}" for name in kind._fields]
            return f"{self.op_or_const(kind, node, path)}({joined(arg, steps)})"
        if kind is torch.Size and any(type(size) is not int for size in arg):
            return f"{self.op('torch', 'Size')}({self.text(node, tuple(arg), path, depth + 1)})"
        return self._object_text(node, arg, path)

    def _object_text(self, node: Node, arg: Any, path: str) -> str:
        if isinstance(arg, SYMBOLIC):
            constant = constant_of(arg)
            known = self._symbols.get(expression(arg))
            if constant is not None or known is not None:
                return self.text(node, known if constant is None else int(constant), path)
            reason = f"is the symbolic number {arg}, and no earlier node has its value. "
            raise refusal(node, path, f"{reason}Make it an input of the graph, or compute it with a node.")
        if isinstance(arg, torch.nn.Parameter):
            reason = "is a parameter. Weights are bound by name: read it with a get_attr node."
            raise refusal(node, path, reason)
        if _holds_node(arg):
            reason = f"is a {type(arg).__qualname__} that holds a node, which cannot be taken apart."
            raise refusal(node, path, reason)
        return self.op_or_const(arg, node, path)


def refusal(node: Node, path: str, reason: str) -> CodegenError:
    """The error for an argument that has no source text."""
    return CodegenError(f"{node.name}: {path} {reason}", node=node.name)


def dotted(path: Path) -> str:
    """Write a dotted path as source, through ``getattr`` where a step is no identifier."""
    text = path[0]
    for step in path[1:]:
        text = f"{text}.{step}" if is_identifier(step) else f"getattr({text}, {step!a})"
    return text


def _holds_node(arg: Any) -> bool:
    if isinstance(arg, dict):
        return _holds_node([*arg, *arg.values()])
    inside = arg if isinstance(arg, (list, tuple, set, frozenset)) else ()
    return isinstance(arg, Node) or any(map(_holds_node, inside))


def _check_picklable(value: Any, node: Node, path: str) -> None:
    """Refuse a constant that could not be stored, while its node is still known."""
    try:
        with open(os.devnull, "wb") as nowhere:
            pickle.dump(value, nowhere, protocol=4)
    except _REFUSALS as error:
        type_name = f"{type(value).__module__}.{type(value).__qualname__}"
        raise UnserializableConstError(
            f"{node.name}: {path} is a {type_name}, which cannot be stored: {error}. Pass it to the graph as "
            "an input, or take what pickles, such as a function or class at the top level of a module.",
            node=node.name,
            path=path,
            type_name=type_name,
        ) from error
