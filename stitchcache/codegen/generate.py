"""From a stitching graph to the source of the function that runs it."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from stitchcache.codegen.reach import is_attribute, is_identifier, is_method
from stitchcache.codegen.scope import Scope, dotted, literal, refusal, variable
from stitchcache.errors import OptionError
from stitchcache.torchside.ops import OpOverload, schema_of

_GRAPH_HASH = re.compile(r"[0-9A-Za-z_.:-]*\Z")
_VARIABLE = re.compile("\0([^\0]*)\0")
# Literals as a whole (written with escapes), brackets, and commas at which a line may be broken.
_TOKEN = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[(\[{]|[)\]}]|,(?= )""")
_NAME = r"\1"
_INDENT = "    "
_WIDTH = 96
_THROWAWAY = "_"
# What Python has syntax for: operators (operands in the same order), and methods in place of ops. By
# identity: a target may be unhashable, or say that it equals another one.
_OPERATORS = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**",
    "matmul": "@", "and_": "&", "or_": "|", "xor": "^", "lshift": "<<", "rshift": ">>", "eq": "==",
    "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "getitem": "[]",
}  # fmt: skip
_SYNTAX = {
    **{id(getattr(operator, name)): text for name, text in _OPERATORS.items()},
    id(getattr): "getattr",
    id(torch.ops.aten.sym_size.int): ".size",
    id(torch.ops.aten.sym_stride.int): ".stride",
    id(torch.ops.aten.sym_numel.default): ".numel",
}


def generate_execution_code(
    split_gm: GraphModule,
    *,
    boxed: Collection[str] = (),
    graph_hash: str = "",
    results: Mapping[str, int] | None = None,
    describe: Callable[[Node], str] | None = None,
) -> tuple[str, list[str], list[Any]]:
    """Write a Python function that does what a stitching graph does.

    The code is a pure function of the graph and the options. `compile_execution_fn` turns it into a
    callable, in this process or another one.

    Args:
        split_gm: The graph. ``GraphModule`` submodules are inlined, at any depth.
        boxed: Qualified names of submodules whose callables take one list of arguments and return a
            sequence. A ``GraphModule`` named here is called, not inlined.
        graph_hash: Named in the function's docstring.
        results: How many values submodules return, by qualified name, where the graph does not tell: those
            are unpacked. Indexing them one by one costs a quarter more than a call written by hand.
        describe: What a node's value is, in one line, such as ``float32[s0, 64]``: a comment says it where
            the value is made.

    Returns:
        The source; the names of the submodules, parameters and buffers that it takes, in order of
        first use; and the constants that it takes.

    Raises:
        CodegenError: A node has no form as source code.
        UnserializableConstError: An argument can neither be written as a literal nor be pickled.
        OptionError: ``graph_hash`` is no hash.
    """
    if not _GRAPH_HASH.match(graph_hash):
        raise OptionError(f"graph_hash is {graph_hash!r}, which is no hash.", option="graph_hash")
    scope = Scope()
    parameters, names = _parameters(split_gm.graph, scope)
    lowering = Lowering(split_gm, scope, frozenset(boxed), results or {}, describe)
    output = lowering.run(split_gm.graph, "")
    result = "None" if output is None else scope.text(output, output.args[0], "args[0]")
    graph = f"graph {graph_hash}" if graph_hash else "a graph"
    pieces = len(lowering.pieces)
    title = f'{_INDENT}"""Run {graph}: {pieces} {"piece" if pieces == 1 else "pieces"}."""'
    body = [title, *_body_lines(names, lowering.statements, result, lowering.described)]
    lines = ["import torch", "import operator", "", *_bind_lines(scope, parameters, body), ""]
    return "\n".join(lines), list(scope.slots), scope.consts


def _parameters(graph: Graph, scope: Scope) -> tuple[list[str], list[str]]:
    """Name every placeholder before anything else is named, as callers may use the names."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    names = [scope.take(str(node.target).lstrip("*")) for node in placeholders]
    texts = []
    for node, name in zip(placeholders, names, strict=True):
        scope.define(node, variable(name))
        stars = str(node.target).count("*", 0, 2)
        default = ""
        if node.args:
            # As in Python, a default is one object for all calls.
            default = f"={literal(node.args[0]) or scope.const(node.args[0], node, 'default')}"
        texts.append("*" * stars + name + default)
    return texts, names


class Statement(NamedTuple):
    """One assignment, before it is known where its values live and which of them anybody needs."""

    targets: Sequence[str]  # names of the values
    expression: str
    unpack: bool = False  # one target for each item of the result
    effect: bool = True  # runs even if nobody needs its values


@dataclass(slots=True)
class Lowering:
    """Turns a graph, and the graphs of the modules that it inlines, into statements."""

    _root: GraphModule
    _scope: Scope
    _boxed: Collection[str]
    _results: Mapping[str, int]
    _describe: Callable[[Node], str] | None
    pieces: set[str] = field(default_factory=set)
    statements: list[Statement] = field(default_factory=list)
    described: dict[str, str] = field(default_factory=dict)  # what the value of a name is

    def run(self, graph: Graph, prefix: str) -> Node | None:
        """Lower every node but the placeholders, which the scope knows; gives the output node, if any."""
        for node in graph.nodes:
            if node.op == "output":
                return node  # type: ignore[no-any-return]
            if node in self._scope.values:  # a placeholder, or an item that was unpacked with its tuple
                continue
            if node.op == "call_function":
                text = None if node.kwargs else self._operator_text(node)
                if text is not None:
                    self._assign(node, text)
                    continue
                function = self._scope.op_or_const(node.target, node, "target")
                self._assign_call(node, self._scope.call(node, function, node.args, node.kwargs))
            elif node.op == "call_method":
                self._call_method(node)
            elif node.op == "call_module":
                self._call_module(node, f"{prefix}{node.target}")
            elif node.op == "get_attr":
                self._get_attr(node, f"{prefix}{node.target}")
            else:
                raise refusal(node, f"a node of kind {node.op!r}", "has no source form.")
        return None

    def _assign(self, node: Node, expression: str, *, effect: bool = True) -> None:
        name = self._named(node)
        self.statements.append(Statement((name,), expression, effect=effect))
        self._scope.define(node, variable(name))

    def _named(self, node: Node) -> str:
        name = self._scope.take(node.name)
        if self._describe is not None:
            self.described[name] = self._describe(node)
        return name

    def _assign_call(
        self, node: Node, expression: str, module: torch.nn.Module | None = None, length: int | None = None
    ) -> None:
        """Assign a call's result, item by item where only its items are wanted."""
        length = _result_length(node, module) if length is None else length
        wanted = _items_used(node, length)
        if not wanted or (length is None and len(wanted) > 1):
            self._assign(node, expression)
            return
        unpack = length is not None and (len(wanted) > 1 or length == 1)
        targets = []
        for place in range(length) if unpack and length is not None else wanted:
            users = wanted.get(place, [])
            targets.append(self._named(users[0]) if users else "_")
            for user in users:
                self._scope.define(user, variable(targets[-1]))
        text = expression if unpack else f"{expression}[{next(iter(wanted))}]"
        self.statements.append(Statement(tuple(targets), text, unpack))
        # Nothing reads the result itself: every user takes items of it. The name keeps the node known.
        self._scope.values[node] = "_"

    def _operator_text(self, node: Node) -> str | None:
        """Write what Python has syntax for, or None."""
        args, syntax = node.args, _SYNTAX.get(id(node.target))
        if syntax is None or len(args) != (1 if syntax == ".numel" else 2):
            return None
        left = self._scope.text(node, args[0], "args[0]")
        if syntax[0] not in ".[g":
            return f"{_operand(left)} {syntax} {_operand(self._scope.text(node, args[1], 'args[1]'))}"
        if not (isinstance(args[0], Node) and _is_name(left)):
            return None
        if syntax == "[]":
            return f"{left}[{self._scope.index(node, args[1])}]"
        if syntax == "getattr":
            return f"{left}.{args[1]}" if type(args[1]) is str and is_attribute(args[1]) else None
        return self._scope.call(node, f"{left}{syntax}", args[1:], {}, first=1)

    def _call_method(self, node: Node) -> None:
        name = str(node.target)
        if not is_method(name):
            reason = "cannot be called from generated code. Call a module's function that calls it."
            raise refusal(node, f"a method named {name!r}", reason)
        if not node.args:
            raise refusal(node, "args", "is empty: a method needs the value that it belongs to.")
        owner = self._scope.text(node, node.args[0], "args[0]")
        if not (isinstance(node.args[0], Node) and _is_name(owner)):
            temporary = self._scope.take(f"{node.name}_self")
            self.statements.append(Statement((temporary,), owner, effect=False))
            owner = variable(temporary)
        call = self._scope.call(node, f"{owner}.{name}", node.args[1:], node.kwargs, first=1)
        self._assign_call(node, call)

    def _call_module(self, node: Node, target: str) -> None:
        try:
            module = self._root.get_submodule(target)
        except AttributeError as error:
            raise refusal(node, "target", f"is {target!r}, which is no submodule.") from error
        boxed = target in self._boxed
        if not boxed and isinstance(module, GraphModule):
            # A graph exported with a pytree signature flattens its arguments first: it is called instead.
            probe = [object()]
            inputs = tuple(module.graph.process_inputs(probe))
            if len(inputs) == 1 and inputs[0] is probe:
                self._inline(node, module, f"{target}.")
                return
        self.pieces.add(target)
        function = self._scope.slot(target)
        if boxed and node.kwargs:
            raise refusal(node, "kwargs", f"cannot be passed to {target}, which takes one list of arguments.")
        args = (list(node.args),) if boxed else node.args
        call = self._scope.call(node, function, args, node.kwargs)
        self._assign_call(node, call, module, self._results.get(target))

    def _inline(self, node: Node, module: GraphModule, prefix: str) -> None:
        scope = self._scope
        for placeholder, arg in _bind_placeholders(node, module.graph):
            text = scope.text(node, arg, str(placeholder.target))
            if literal(arg) is not None or isinstance(arg, Node):
                scope.define(placeholder, text)
            else:
                self._assign(placeholder, text, effect=False)
        output = self.run(module.graph, prefix)
        result = output.args[0] if output is not None else None
        if isinstance(result, Node):
            scope.define(node, scope.values[result])
        elif not self._forward_items(node, result):
            self._assign(node, scope.text(node, result, "output"), effect=False)
        # An inlined graph may be called again: its nodes get new names then.
        for inner in module.graph.nodes:
            scope.values.pop(inner, None)

    def _forward_items(self, node: Node, result: Any) -> bool:
        """Call an inlined tuple's items by their own names where only items are wanted."""
        wanted = _items_used(node, len(result)) if isinstance(result, (tuple, list)) else None
        if not wanted or not all(isinstance(result[index], Node) for index in wanted):
            return False
        for index, users in wanted.items():
            for user in users:
                self._scope.define(user, self._scope.values[result[index]])
        self._scope.values[node] = "_"
        return True

    def _get_attr(self, node: Node, qualified_name: str) -> None:
        path, _, name = qualified_name.rpartition(".")
        try:
            owner = operator.attrgetter(path)(self._root) if path else self._root
            value: Any = getattr(owner, name)
        except AttributeError as error:
            raise refusal(node, "target", f"is {qualified_name!r}, which is no attribute.") from error
        is_buffer = isinstance(owner, torch.nn.Module) and owner._buffers.get(name) is not None
        if is_buffer or isinstance(value, (torch.nn.Parameter, torch.nn.Module)):
            text = self._scope.slot(qualified_name)
        else:
            # Anything mutable stays the object that it is, as reading an attribute does not copy.
            text = literal(value) or self._scope.const(value, node, "target")
        self._scope.define(node, text)


def _is_name(text: str) -> bool:
    """Whether a value's text can be called upon (``x.method()``, ``x[0]``): all but literals can."""
    return is_identifier(text.strip("\0"))


def _operand(text: str) -> str:
    # A sign or a keyword would bind differently; names, numbers and brackets stand for themselves.
    return f"({text})" if text.startswith("-") else text


def _items_used(node: Node, length: int | None) -> dict[int, list[Node]] | None:
    """Index to the nodes that take that item; ``None`` where anything but items of the result is used.

    Indices count from the front where ``length`` is known.
    """
    found: dict[int, list[Node]] = {}
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


def _result_length(node: Node, module: torch.nn.Module | None) -> int | None:
    """How many items a call's result has; ``None`` where that may change from call to call.

    Unpacking needs the exact number, and a result that is a sequence: a tensor or dict would unpack
    into something else than what indexing gives.
    """
    if isinstance(module, GraphModule):
        output = next((n for n in reversed(module.graph.nodes) if n.op == "output"), None)
        if output is not None and isinstance(output.args[0], (tuple, list)):
            return len(output.args[0])
    value = node.meta.get("val", node.meta.get("example_value"))
    # A list that an op returns (split, unbind) may have another length at another size.
    if isinstance(value, tuple) or (module is not None and isinstance(value, list)):
        return len(value)
    returns = schema_of(node.target).returns if isinstance(node.target, OpOverload) else ()
    return len(returns) if len(returns) > 1 else None


def _bind_placeholders(node: Node, graph: Graph) -> Iterator[tuple[Node, Any]]:
    """Match the arguments of a ``call_module`` node with placeholders, as a Python call would."""
    # By hand: inspect.Signature takes identifiers only, and a placeholder may have any name.
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
            raise refusal(node, str(node.target), f"needs an argument {name!r}.")
    if args or kwargs:
        extra = f"{len(args)} more positional" if args else f"unknown {list(kwargs)}"
        raise refusal(node, str(node.target), f"is called with {extra} arguments.")


def _body_lines(
    parameters: Sequence[str], statements: Sequence[Statement], result: str, described: Mapping[str, str]
) -> list[str]:
    """Write a function's body, freeing each value right after its last use.

    What the return reads is not freed: the frame that ends does that.
    """
    needed = set(_VARIABLE.findall(result))
    backwards: list[list[str]] = []
    for statement in reversed(statements):
        live = [name in needed for name in statement.targets]
        if not (statement.effect or any(live)):
            continue
        # dict keeps the order of first use, so the text does not depend on hashing.
        used = dict.fromkeys(_VARIABLE.findall(statement.expression))
        last = [name for name in used if name not in needed]
        needed.update(last)
        backwards.append(_statement_lines(statement, live, last, described))
    unused = [name for name in parameters if name not in needed]
    lines = [f"{_INDENT}del {', '.join(unused)}"] if unused else []
    lines += chain.from_iterable(reversed(backwards))
    return [*lines, *_folded(f"{_INDENT}return {_VARIABLE.sub(_NAME, result)}")]


def _statement_lines(
    statement: Statement, live: Sequence[bool], freed: list[str], described: Mapping[str, str]
) -> list[str]:
    text = _VARIABLE.sub(_NAME, statement.expression)
    names = [name if alive else _THROWAWAY for name, alive in zip(statement.targets, live, strict=True)]
    if any(live):
        text = f"{_listed(names) if statement.unpack else names[0]} = {text}"
        freed = freed if all(live) else [*freed, _THROWAWAY]
    lines = _folded(f"{_INDENT}{text}")
    if said := [described[name] for name in names if name in described]:
        counted = [(kind, len(list(same))) for kind, same in groupby(said)]
        lines[-1] += f"  # {', '.join(kind if n == 1 else f'{n} x {kind}' for kind, n in counted)}"
    return [*lines, f"{_INDENT}del {', '.join(freed)}"] if freed else lines


def _listed(names: Collection[str]) -> str:
    """Targets of an unpacking; in brackets where they take more than a line, or are easily overlooked."""
    text = ", ".join(names)
    return f"({text},)" if len(names) == 1 else f"({text})" if len(text) > _WIDTH // 2 else text


def _folded(line: str) -> list[str]:
    """A line, broken at commas between brackets where it is too long to read."""
    start, depth = len(line) - len(line.lstrip()), 0
    places = []
    for token in _TOKEN.finditer(line):
        depth += (token[0] in "([{") - (token[0] in ")]}")
        if token[0] == "," and depth:
            places.append(token.end())
    lines: list[str] = []
    begin = best = 0
    for place in (*places, len(line)):
        # A comma may stand where the line is full.
        room = _WIDTH + (place < len(line)) - (start + 8 if lines else 0)
        if place - begin > room and best > begin:
            lines.append(line[begin:best].strip())
            begin = best
        best = place
    lines.append(line[begin:].strip())
    return [" " * (start if index == 0 else start + 8) + text for index, text in enumerate(lines)]


def _bind_lines(scope: Scope, parameters: Sequence[str], body: Sequence[str]) -> list[str]:
    inside = []
    if scope.slots:
        inside += _folded(f"{_listed(scope.slots.values())} = __submods__")
    if scope.consts:
        inside += _folded(f"{_listed(scope.const_texts.values())} = __consts__")
    inside += [f"{name} = {dotted(path)}" for path, name in scope.ops.items()]
    head = _folded(f"def execution_fn({', '.join(parameters)}):")
    inside += ["", *head, *body, "", "return execution_fn"]
    indented = [f"{_INDENT}{line}" if line else "" for line in inside]
    return ["", "def bind(__submods__, __consts__):", *indented]
