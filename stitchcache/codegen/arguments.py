"""How an argument of a node becomes source text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.fx.immutable_collections import immutable_dict, immutable_list

from stitchcache.codegen.bindings import Bindings
from stitchcache.codegen.liveness import value_mark
from stitchcache.codegen.names import is_identifier, literal
from stitchcache.errors import CodegenError
from stitchcache.torchside.symbols import constant_of

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass


_MAX_DEPTH = 60  # Python's parser gives up at 200 nested brackets, and a call level can take three.


class Ref(NamedTuple):
    """What a node's value is called in the code.

    Args:
        text: The value's name; for what is no value of this function, its source text.
        local: Whether it is a value of this function, which lives in a variable and is freed.
    """

    text: str
    local: bool = False

    @property
    def is_name(self) -> bool:
        """Whether it can be called upon: ``x.method()``, ``x[0]``."""
        return is_identifier(self.text) or self.text.startswith("__vllm_")


@dataclass(slots=True)
class Scope:
    """Everything that source text of one node's arguments depends on.

    Args:
        bindings: Slots of the function.
        values: What the values of earlier nodes are called.
        symbol: Finds the node whose value a symbolic number is.
        node: Name of the node whose arguments are written.
        uses: Local names read so far.
    """

    bindings: Bindings
    values: Mapping[torch.fx.Node, Ref]
    symbol: Callable[[Any], torch.fx.Node | None]
    node: str
    uses: list[str] = field(default_factory=list)

    def error(self, path: str, reason: str) -> CodegenError:
        """Make the error for an argument that has no source text."""
        return CodegenError(f"{self.node}: {path} {reason}", node=self.node)


def call_text(
    function: str, args: Sequence[Any], kwargs: Mapping[str, Any], scope: Scope, *, first: int = 0
) -> str:
    """Write a call.

    Args:
        function: Source text of what is called.
        args: Positional arguments.
        kwargs: Keyword arguments; their names need not be identifiers.
        scope: Of the node.
        first: Number of the first positional argument in the node's own arguments.
    """
    parts = [argument_text(arg, scope, f"args[{i}]") for i, arg in enumerate(args, first)]
    rest: list[str] = []
    for key, value in kwargs.items():
        text = argument_text(value, scope, f"kwargs[{key!r}]")
        # Once one needs a dict the others follow it there, so that the order stays.
        if rest or not is_identifier(key):
            rest.append(f"{key!a}: {text}")
        else:
            parts.append(f"{key}={text}")
    if rest:
        parts.append("**{" + ", ".join(rest) + "}")
    return f"{function}({', '.join(parts)})"


def argument_text(arg: Any, scope: Scope, path: str, *, subscript: bool = False, depth: int = 0) -> str:
    """Write an argument as source text.

    Args:
        arg: A node, or anything that a node may have for an argument.
        scope: Of the node whose argument it is.
        path: Where in the node's arguments it stands, for messages.
        subscript: Whether it stands between subscript brackets, where slices have a form of their own.
        depth: Containers around it.

    Returns:
        Source text of an expression.

    Raises:
        CodegenError: It holds a node, but its type cannot be taken apart.
        UnserializableConstError: It can neither be written nor be pickled.
    """
    if isinstance(arg, torch.fx.Node):
        return _value_text(arg, scope, path)
    text = literal(arg)
    if text is not None:
        return text
    if depth > _MAX_DEPTH:
        raise scope.error(path, f"is nested more than {_MAX_DEPTH} levels deep.")

    def inner(value: Any, step: str, nested: bool = False) -> str:
        return argument_text(value, scope, f"{path}{step}", subscript=nested, depth=depth + 1)

    kind = type(arg)
    if kind is list or kind is immutable_list:
        return "[" + ", ".join(inner(item, f"[{i}]") for i, item in enumerate(arg)) + "]"
    if kind is dict or kind is immutable_dict:
        pairs = [
            f"{inner(k, '.keys()')}: {inner(v, f'[{literal(k) or type(k).__name__}]')}"
            for k, v in arg.items()
        ]
        return "{" + ", ".join(pairs) + "}"
    if kind is tuple:
        items = [inner(item, f"[{i}]", subscript) for i, item in enumerate(arg)]
        if subscript and items:
            return ", ".join(items) + ("," if len(items) == 1 else "")
        return "(" + ", ".join(items) + ("," if len(items) == 1 else "") + ")"
    if isinstance(arg, (slice, range)):
        steps = ("start", "stop", "step")
        if subscript and isinstance(arg, slice):
            start, stop, step = (
                "" if getattr(arg, s) is None else inner(getattr(arg, s), f".{s}") for s in steps
            )
            return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"
        parts = [inner(getattr(arg, step), f".{step}") for step in steps]
        return f"{scope.bindings.op(kind.__name__)}({', '.join(parts)})"
    if isinstance(arg, tuple) and hasattr(kind, "_fields"):
        fields = [inner(item, f".{name}") for name, item in zip(kind._fields, arg, strict=True)]
        return f"{scope.bindings.callable(kind, scope.node, path)}({', '.join(fields)})"
    if kind is torch.Size and any(type(size) is not int for size in arg):
        return f"{scope.bindings.op('torch', 'Size')}({inner(tuple(arg), '')})"
    return _object_text(arg, scope, path)


def _value_text(node: torch.fx.Node, scope: Scope, path: str) -> str:
    if node not in scope.values:
        raise scope.error(path, f"is the value of {node.name}, which is not computed before this node.")
    ref = scope.values[node]
    if not ref.local:
        return ref.text
    scope.uses.append(ref.text)
    return value_mark(ref.text)


def _object_text(arg: Any, scope: Scope, path: str) -> str:
    if isinstance(arg, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return _symbol_text(arg, scope, path)
    if isinstance(arg, torch.nn.Parameter):
        raise scope.error(path, "is a parameter. Weights are bound by name: read it with a get_attr node.")
    if _holds_node(arg):
        raise scope.error(
            path, f"is a {type(arg).__qualname__} that holds a node, which cannot be taken apart."
        )
    if callable(arg) or isinstance(arg, type):
        return scope.bindings.callable(arg, scope.node, path)
    return scope.bindings.const(arg, scope.node, path)


def _symbol_text(arg: Any, scope: Scope, path: str) -> str:
    constant = constant_of(arg)
    if constant is not None:
        return repr(int(constant))
    node = scope.symbol(arg)
    if node is None:
        raise scope.error(
            path,
            f"is the symbolic number {arg}, and no earlier node has its value. "
            "Make it an input of the graph, or compute it with a node.",
        )
    return _value_text(node, scope, path)


def _holds_node(arg: Any) -> bool:
    if isinstance(arg, torch.fx.Node):
        return True
    if isinstance(arg, (list, tuple, set, frozenset)):
        return any(map(_holds_node, arg))
    return isinstance(arg, dict) and any(_holds_node(k) or _holds_node(v) for k, v in arg.items())
