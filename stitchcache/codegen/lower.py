"""From the nodes of a graph to the statements of a function."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch

from stitchcache.codegen.arguments import Ref, Scope, argument_text, call_text
from stitchcache.codegen.bindings import Bindings
from stitchcache.codegen.liveness import Statement, value_mark
from stitchcache.codegen.names import Namespace, literal
from stitchcache.codegen.reach import is_attribute, is_method
from stitchcache.errors import CodegenError
from stitchcache.torchside.ops import OpOverload, schema_of
from stitchcache.torchside.symbols import SYMBOLIC, expression

# Each is the same operation as the function, operands in the same order.
_OPERATORS: dict[Any, str] = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.pow: "**",
    operator.matmul: "@",
    operator.and_: "&",
    operator.or_: "|",
    operator.xor: "^",
    operator.lshift: "<<",
    operator.rshift: ">>",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}


class Lowering:
    """Turns a graph, and the graphs of the modules that it inlines, into statements.

    Args:
        root: The module whose graph it is.
        namespace: Where names come from.
        bindings: Slots of the function.
        boxed: Submodules that take one list.
        unpack: Whether tuple results are unpacked.
    """

    def __init__(
        self,
        root: torch.fx.GraphModule,
        namespace: Namespace,
        bindings: Bindings,
        *,
        boxed: Collection[str],
        unpack: bool,
    ) -> None:
        self._root = root
        self._namespace = namespace
        self._bindings = bindings
        self._boxed = frozenset(boxed)
        self._unpack = unpack
        self._size_methods: dict[Any, str] = {
            torch.ops.aten.sym_size.int: "size",
            torch.ops.aten.sym_stride.int: "stride",
            torch.ops.aten.sym_numel.default: "numel",
        }
        self._buffers: dict[int, frozenset[str]] = {}
        self._symbols: dict[Any, torch.fx.Node] = {}
        self._values: dict[torch.fx.Node, Ref] = {}
        self.pieces: set[str] = set()
        self.statements: list[Statement] = []

    def define(self, node: torch.fx.Node, ref: Ref) -> None:
        """Say what the value of a node is called."""
        self._values[node] = ref
        value = node.meta.get("val", node.meta.get("example_value"))
        if isinstance(value, SYMBOLIC):
            self._symbols.setdefault(expression(value), node)

    def run(self, graph: torch.fx.Graph, prefix: str) -> torch.fx.Node | None:
        """Lower every node but the placeholders, which are defined already.

        Args:
            graph: The graph.
            prefix: Qualified name of its module and a dot, or ``""`` for the root.

        Returns:
            The output node, if there is one.
        """
        for node in graph.nodes:
            if node.op == "output":
                return node  # type: ignore[no-any-return]
            if node in self._values:  # a placeholder, or an item that was unpacked with its tuple
                continue
            if node.op == "call_function":
                self._call_function(node)
            elif node.op == "call_module":
                self._call_module(node, prefix)
            elif node.op == "call_method":
                self._call_method(node)
            elif node.op == "get_attr":
                self._get_attr(node, prefix)
            else:
                raise CodegenError(
                    f"{node.name}: a node of kind {node.op!r} has no source form.", node=node.name
                )
        return None

    def scope(self, node: torch.fx.Node) -> Scope:
        """Make the scope for writing a node's arguments."""
        return Scope(self._bindings, self._values, lambda v: self._symbols.get(expression(v)), node.name)

    def _assign(self, node: torch.fx.Node, expression: str, scope: Scope, *, effect: bool = True) -> None:
        name = self._namespace.take(node.name)
        self.statements.append(Statement((name,), expression, tuple(scope.uses), effect=effect))
        self.define(node, Ref(name, local=True))

    def _assign_call(self, node: torch.fx.Node, expression: str, scope: Scope, length: int | None) -> None:
        """Assign a call's result, item by item where only its items are wanted."""
        wanted = _items_used(node, length) if self._unpack else None
        if not wanted or (length is None and len(wanted) > 1):
            self._assign(node, expression, scope)
            return
        places = range(length) if length is not None and (len(wanted) > 1 or length == 1) else wanted
        targets = []
        for place in places:
            users = wanted.get(place, [])
            targets.append(self._namespace.take(users[0].name) if users else "_")
            for user in users:
                self.define(user, Ref(targets[-1], local=True))
        unpack = isinstance(places, range)
        text = expression if unpack else f"{expression}[{next(iter(wanted))}]"
        self.statements.append(Statement(tuple(targets), text, tuple(scope.uses), unpack=unpack))
        # Nothing reads the result itself: every user takes items of it. The name keeps the node known.
        self._values[node] = Ref("_")

    def _call_function(self, node: torch.fx.Node) -> None:
        target, args, kwargs = node.target, node.args, node.kwargs
        scope = self.scope(node)
        if not kwargs:
            expression = self._operator_text(target, args, scope)
            if expression is not None:
                self._assign(node, expression, scope)
                return
            scope.uses.clear()
        function = self._bindings.callable(target, node.name, "target")
        self._assign_call(node, call_text(function, args, kwargs, scope), scope, _result_length(node, None))

    def _operator_text(self, target: Any, args: tuple[Any, ...], scope: Scope) -> str | None:
        """Write what Python has syntax for, or None."""
        method = self._size_methods.get(target) if _hashable(target) else None
        if method is not None and self._is_named(args, 1 if method == "numel" else 2):
            owner = argument_text(args[0], scope, "args[0]")
            return call_text(f"{owner}.{method}", args[1:], {}, scope, first=1)
        if target is getattr and len(args) == 2 and self._is_named(args, 2):
            name = args[1]
            if type(name) is str and is_attribute(name):
                return f"{argument_text(args[0], scope, 'args[0]')}.{name}"
            return None
        if target is operator.getitem and self._is_named(args, 2):
            index = argument_text(args[1], scope, "args[1]", subscript=True)
            return f"{argument_text(args[0], scope, 'args[0]')}[{index}]"
        symbol = _OPERATORS.get(target) if _hashable(target) else None
        if symbol is None or len(args) != 2:
            return None
        left, right = (_operand(argument_text(arg, scope, f"args[{i}]")) for i, arg in enumerate(args))
        return f"{left} {symbol} {right}"

    def _is_named(self, args: tuple[Any, ...], count: int) -> bool:
        return (
            len(args) == count
            and isinstance(args[0], torch.fx.Node)
            and args[0] in self._values
            and self._values[args[0]].is_name
        )

    def _call_method(self, node: torch.fx.Node) -> None:
        name = str(node.target)
        if not is_method(name):
            raise CodegenError(
                f"{node.name}: a method named {name!r} cannot be called from generated code. "
                "Call a function at the top level of a module that calls it.",
                node=node.name,
            )
        scope = self.scope(node)
        if not node.args:
            raise scope.error("args", "is empty: a method needs the value that it belongs to.")
        owner = argument_text(node.args[0], scope, "args[0]")
        if not self._is_named(node.args, len(node.args)):
            temporary = self._namespace.take(f"{node.name}_self")
            self.statements.append(Statement((temporary,), owner, tuple(scope.uses), effect=False))
            scope.uses[:] = [temporary]
            owner = value_mark(temporary)
        expression = call_text(f"{owner}.{name}", node.args[1:], node.kwargs, scope, first=1)
        self._assign_call(node, expression, scope, _result_length(node, None))

    def _call_module(self, node: torch.fx.Node, prefix: str) -> None:
        target = f"{prefix}{node.target}"
        try:
            module = self._root.get_submodule(target)
        except AttributeError as error:
            raise CodegenError(f"{node.name}: there is no submodule {target!r}.", node=node.name) from error
        boxed = target in self._boxed
        if not boxed and isinstance(module, torch.fx.GraphModule) and _takes_placeholders(module):
            self._inline(node, module, f"{target}.")
            return
        scope = self.scope(node)
        self.pieces.add(target)
        function = self._bindings.slot(target)
        if not boxed:
            expression = call_text(function, node.args, node.kwargs, scope)
        elif node.kwargs:
            raise scope.error("kwargs", f"cannot be passed to {target}, which takes one list of arguments.")
        else:
            items = ", ".join(argument_text(arg, scope, f"args[{i}]") for i, arg in enumerate(node.args))
            expression = f"{function}([{items}])"
        self._assign_call(node, expression, scope, _result_length(node, module))

    def _inline(self, node: torch.fx.Node, module: torch.fx.GraphModule, prefix: str) -> None:
        for placeholder, arg in _bind_placeholders(node, module.graph):
            self._define_argument(node, placeholder, arg)
        output = self.run(module.graph, prefix)
        # An inlined graph may be called again: its nodes get new names then.
        result = output.args[0] if output is not None else None
        if isinstance(result, torch.fx.Node):
            self.define(node, self._values[result])
        elif not self._forward_items(node, result):
            scope = self.scope(node)
            self._assign(node, argument_text(result, scope, "output"), scope, effect=False)
        for inner in module.graph.nodes:
            self._values.pop(inner, None)

    def _define_argument(self, node: torch.fx.Node, placeholder: torch.fx.Node, arg: Any) -> None:
        text = literal(arg)
        if text is not None:
            self.define(placeholder, Ref(text))
        elif isinstance(arg, torch.fx.Node) and arg in self._values:
            self.define(placeholder, self._values[arg])
        else:
            scope = self.scope(node)
            self._assign(placeholder, argument_text(arg, scope, str(placeholder.target)), scope, effect=False)

    def _forward_items(self, node: torch.fx.Node, result: Any) -> bool:
        """Call an inlined tuple's items by their own names where only items are wanted."""
        wanted = _items_used(node, len(result)) if isinstance(result, (tuple, list)) else None
        if not wanted or not all(isinstance(result[index], torch.fx.Node) for index in wanted):
            return False
        for index, users in wanted.items():
            for user in users:
                self.define(user, self._values[result[index]])
        self._values[node] = Ref("_")
        return True

    def _get_attr(self, node: torch.fx.Node, prefix: str) -> None:
        qualified_name = f"{prefix}{node.target}"
        name = qualified_name.rpartition(".")[2]
        value: Any = self._root
        try:
            for step in qualified_name.split("."):
                owner, value = value, getattr(value, step)
        except AttributeError as error:
            raise CodegenError(
                f"{node.name}: there is no attribute {qualified_name!r}.", node=node.name
            ) from error
        if isinstance(value, (torch.nn.Parameter, torch.nn.Module)) or self._is_buffer(owner, name):
            self.define(node, Ref(self._bindings.slot(qualified_name)))
            return
        text = literal(value)
        # Anything mutable stays the object that it is, as reading an attribute does not copy.
        self.define(node, Ref(text if text is not None else self._bindings.const(value, node.name, "target")))

    def _is_buffer(self, owner: Any, name: str) -> bool:
        if not isinstance(owner, torch.nn.Module):
            return False
        if id(owner) not in self._buffers:
            self._buffers[id(owner)] = frozenset(key for key, _ in owner.named_buffers(recurse=False))
        return name in self._buffers[id(owner)]


def _operand(text: str) -> str:
    # A sign or a keyword would bind differently; names, numbers and brackets stand for themselves.
    return f"({text})" if text.startswith("-") else text


def _hashable(target: Any) -> bool:
    return type(target).__hash__ is not None


def _items_used(node: torch.fx.Node, length: int | None) -> dict[int, list[torch.fx.Node]] | None:
    """Index to the nodes that take that item; ``None`` where anything but items of the result is used.

    Indices count from the front where ``length`` is known.
    """
    found: dict[int, list[torch.fx.Node]] = {}
    for user in node.users:
        if user.op != "call_function" or user.target is not operator.getitem or user.kwargs:
            return None
        source, index = user.args if len(user.args) == 2 else (None, None)
        # Not isinstance: True is an int, and an index by it is no item of a tuple that unpacking gives.
        if source is not node or type(index) is not int:
            return None
        if length is not None and not -length <= index < length:
            return None
        found.setdefault(index if length is None else index % length, []).append(user)
    return found


def _result_length(node: torch.fx.Node, module: torch.nn.Module | None) -> int | None:
    """How many items a call's result has; ``None`` where that may change from call to call.

    Unpacking needs the exact number, and a result that is a sequence: a tensor or dict would unpack
    into something else than what indexing gives.
    """
    if isinstance(module, torch.fx.GraphModule):
        output = next((n for n in reversed(module.graph.nodes) if n.op == "output"), None)
        if output is not None and isinstance(output.args[0], (tuple, list)):
            return len(output.args[0])
    value = node.meta.get("val", node.meta.get("example_value"))
    # A list that an op returns (split, unbind) may have another length at another size.
    if isinstance(value, tuple) or (module is not None and isinstance(value, list)):
        return len(value)
    if isinstance(node.target, OpOverload):
        returns = schema_of(node.target).returns
        return len(returns) if len(returns) > 1 else None
    return None


def _takes_placeholders(module: torch.fx.GraphModule) -> bool:
    """Whether a call's arguments are the placeholders' values one to one.

    A graph exported with a pytree signature flattens its arguments first; such a module is called as
    any other.
    """
    probe = [object()]
    inputs = tuple(module.graph.process_inputs(probe))
    return len(inputs) == 1 and inputs[0] is probe


def _bind_placeholders(node: torch.fx.Node, graph: torch.fx.Graph) -> Iterator[tuple[torch.fx.Node, Any]]:
    """Match the arguments of a ``call_module`` node with placeholders, as a Python call would.

    Written by hand: ``inspect.Signature`` takes identifiers only, and a placeholder may have any name.
    """
    args, kwargs = list(node.args), dict(node.kwargs)
    for placeholder in graph.nodes:
        if placeholder.op != "placeholder":
            continue
        name = str(placeholder.target)
        if name.startswith("**"):
            yield placeholder, kwargs
            kwargs = {}
        elif name.startswith("*"):
            yield placeholder, tuple(args)
            args = []
        elif args:
            yield placeholder, args.pop(0)
        elif name in kwargs:
            yield placeholder, kwargs.pop(name)
        elif placeholder.args:
            yield placeholder, placeholder.args[0]
        else:
            raise CodegenError(f"{node.name}: {node.target} needs an argument {name!r}.", node=node.name)
    if args or kwargs:
        extra = f"{len(args)} more positional" if args else f"unknown {list(kwargs)}"
        raise CodegenError(f"{node.name}: {node.target} is called with {extra} arguments.", node=node.name)
