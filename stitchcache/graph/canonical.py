"""The graph hash: equal for equal graphs in any process, different for anything that matters.

Written with the encoder that keys use. Nodes are numbered by position, symbols and devices of one type by
first appearance, so names, stack traces, device indices and the process do not count. What else a graph holds
counts. Two rules differ from keys: equal values are one value, whichever objects are shared, as a fresh trace
makes new ones; and sets are written sorted.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.immutable_collections import immutable_dict, immutable_list

from stitchcache.containers import FAMILIES, HANDLERS, put_code, put_dict, put_list, put_members
from stitchcache.encoding import SCALARS, Handler, Writer
from stitchcache.errors import SplitError
from stitchcache.graph import symbols
from stitchcache.graph.effects import attribute_of, target_name
from stitchcache.torchside import TABLES
from stitchcache.torchside.ops import HigherOrderOperator, OpOverload, OpOverloadPacket, schema_of
from stitchcache.types import Factor

SCHEMA = "stitchcache graph 4"


def graph_hash(split_gm: GraphModule, factors: Iterable[Factor] = ()) -> str:
    """Hash a graph and everything below it.

    Args:
        split_gm: A graph module; submodules that are graph modules are part of the hash.
        factors: Further named facts that distinguish what is built from the graph (backend,
            options, environment).

    Returns:
        64 hex digits.

    Raises:
        SplitError: An argument has a value that has no canonical form.
    """
    writer = GraphWriter()
    try:
        writer.text(SCHEMA)
        writer.graph_module(split_gm)
        writer.pairs(b"factors", sorted((factor.name, factor.digest) for factor in factors))
    except (ValueError, TypeError, RuntimeError) as error:
        # What a value answers that is asked for its parts is told with the place, as our own refusals are.
        told = writer.error(getattr(error, "why", str(error)))
        advice = "Pass plain values, tensors or Python objects."
        raise SplitError(f"the graph cannot be hashed: {told}. {advice}") from error
    return hashlib.sha256(writer.out).hexdigest()


class GraphWriter(Writer):
    """Writes graphs and the values in them."""

    def __init__(self) -> None:
        super().__init__()
        self.handlers = _HANDLERS
        self.families = _FAMILIES
        self._symbols = symbols.SymbolNames()
        self._devices: dict[str, int] = {}
        self._within: list[types.FunctionType] = []
        self.numbered: list[dict[Node, int]] = []  # nodes of each graph that is being written, by position
        self._passed = 0

    def again(self, value: Any) -> bool:
        """Never: a value counts by what it is, not by which object it is."""
        return False

    def graph_module(self, gm: GraphModule) -> None:
        """Write the graph of a module, and those that it calls."""
        nodes = list(gm.graph.nodes)
        self.head(b"graph", len(nodes) + 2)
        self.numbered.append({node: number for number, node in enumerate(nodes)})
        for node in nodes:
            self.head(b"node", 5)
            self.text(node.op)
            self._target(gm, node)
            self.put_at(f".{node.name}.args", node.args)
            self.put_at(f".{node.name}.kwargs", dict(sorted(node.kwargs.items())))
            self.metadata(symbols.value_of(node))
        self.numbered.pop()
        # What compilers know about the symbols met so far: ranges, and relations between them.
        shape_env = symbols.shape_environment(gm.graph)
        known = [symbol for symbol, _ in self._symbols.items()] if shape_env is not None else []
        self.parts(b"symbols", *(symbols.bounds(shape_env, symbol) for symbol in known))
        relations = symbols.relations(shape_env, self._symbols) if shape_env is not None else []
        self.parts(b"relations", *sorted(relations))

    def _target(self, gm: GraphModule, node: Node) -> None:
        target = node.target
        if node.op == "call_function":
            self.put_at(f".{node.name}.target", target)
        elif node.op == "call_module":
            module = gm.get_submodule(str(target))
            # Not put: what a graph holds that is called is bound by name, as its caller's tensors are.
            if isinstance(module, GraphModule):
                self.graph_module(module)
            else:
                self.put_at(f".{target}", module)
        elif node.op == "get_attr":
            self._attribute(gm, str(target))
        else:
            self.put(str(target) if node.op == "call_method" else None)

    def _attribute(self, gm: GraphModule, path: str) -> None:
        owner, _, name = path.rpartition(".")
        module = gm.get_submodule(owner)
        if not self._passed and (name in module._parameters or name in module._buffers):
            # Bound by name when the code runs, so the name is part of what is built. Nobody binds what a
            # graph holds that is passed to a higher-order op: there it is a constant.
            self.head(b"bound attribute", 2)
            self.text(path)
            self.metadata(getattr(module, name))
        else:
            self.head(b"constant attribute", 1)
            self.put_at(f".{path}", attribute_of(gm, path))

    def put_passed(self, gm: GraphModule) -> None:
        """Write a graph that is a value: an argument of a higher-order op."""
        self._passed += 1
        self.graph_module(gm)
        self._passed -= 1

    def metadata(self, value: Any) -> None:
        """Write what is known of a value before it exists: never a tensor's contents."""
        if isinstance(value, torch.Tensor):
            self.head(b"tensor of", 4)
            self.text(f"{value.dtype} {value.layout} {value.is_conj()} {value.is_neg()}")
            self.text(self.device(value.device))
            self.metadata(tuple(value.shape))
            self.metadata(symbols.stride_of(value))
        elif isinstance(value, symbols.SYMBOLIC):
            expr = self._symbols.rename(symbols.expression(value))
            self.parts(b"symbol", type(value).__name__, symbols.structure(expr))
        elif isinstance(value, (list, tuple)):
            self.head(b"values", len(value))
            for item in value:
                self.metadata(item)
        elif type(value) in SCALARS:
            self.put(value)
        else:
            self.parts(b"unknown", f"{type(value).__module__}.{type(value).__qualname__}")

    def device(self, device: torch.device) -> str:
        """A device without its index; several of one type are told apart by order of appearance."""
        if ":" not in str(device):
            return device.type
        number = self._devices.setdefault(str(device), len(self._devices))
        first = min(n for name, n in self._devices.items() if name.startswith(f"{device.type}:"))
        return f"{device.type} {number - first}"

    def python(self, function: types.FunctionType) -> None:
        """Write code, defaults, closure, and what it reads of its module's globals."""
        module = function.__module__ or ""
        if module == "torch" or module.startswith("torch."):
            self.head(b"torch", 0)  # torch's version is a factor of every key
            return
        if function in self._within:
            self.head(b"recursion", 0)
            return
        self._within.append(function)
        self.head(b"python", 5)
        self._code(function.__code__)
        self.put_at(".__defaults__", function.__defaults__)
        self.put_at(".__kwdefaults__", function.__kwdefaults__)
        self.parts(b"closure", *(cell.cell_contents for cell in function.__closure__ or ()))
        read = sorted(_names(function.__code__) & function.__globals__.keys())
        self.pairs(b"globals", [(name, function.__globals__[name]) for name in read])
        self._within.pop()

    def _code(self, code: types.CodeType) -> None:
        put_code(self, code, self._code)

    def put_object(self, value: Any) -> None:
        """Write an object by its attributes (one of torch's own made in C as it pickles), and its calls."""
        kind = type(value)
        self.head(b"instance", 2)
        if kind.__module__.startswith("torch.") and not self.layout(kind)[0]:
            self.parts(b"reduced", self.class_label(kind), value.__reduce_ex__(4))
        else:
            super().put_object(value)
        call: Any = getattr(kind, "__call__", None)  # noqa: B004 - its code is wanted
        if isinstance(call, types.FunctionType):
            self.python(call)
        else:
            self.put(None)


def _names(code: types.CodeType) -> set[str]:
    below = [_names(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*below)


def _put_set(writer: GraphWriter, value: set[Any] | frozenset[Any]) -> None:
    writer.head(type(value).__name__.encode(), 1)
    put_members(writer, value)


def _put_function(writer: GraphWriter, function: types.FunctionType) -> None:
    writer.head(b"function", 2)
    writer.text(target_name(function))
    writer.python(function)


def _put_op(writer: GraphWriter, op: Any) -> None:
    schema = str(schema_of(op)) if isinstance(op, OpOverload) else ""
    # What a method made in C is bound to: a function to its module, or to a class of torch's.
    owner = op.__self__ if isinstance(op, types.BuiltinFunctionType) else None
    bound = None if isinstance(owner, (types.ModuleType, type)) else owner
    writer.parts(b"op", target_name(op), schema, bound)


def _put_tensor(writer: GraphWriter, value: torch.Tensor) -> None:
    """A constant tensor, contents included."""
    writer.head(b"tensor", 2)
    writer.metadata(value)
    plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous().flatten()
    data = plain.view(torch.uint8).numpy().data if plain.numel() else b""
    writer.put(hashlib.sha256(data).digest())


def _put_module(writer: GraphWriter, module: torch.nn.Module) -> None:
    """A module that is called as it is: class, code, attributes, and what is below it."""
    forward: Any = type(module).forward
    writer.head(b"module", 5)
    writer.put_class(type(module))
    writer.python(forward)
    tensors = {**module._parameters, **module._buffers}
    writer.head(b"tensors", 2)
    writer.put(list(tensors))
    writer.metadata(list(tensors.values()))
    writer.pairs(b"attributes", [item for item in sorted(vars(module).items()) if item[0] not in TABLES])
    writer.pairs(b"children", module._modules.items())


_HANDLERS: Mapping[type, Handler] = {
    **HANDLERS,
    **dict.fromkeys((set, frozenset), _put_set),
    **dict.fromkeys(
        (torch.dtype, torch.layout, torch.memory_format, torch.qscheme),
        lambda writer, value: writer.parts(b"torch value", type(value).__name__, str(value)),
    ),
    **dict.fromkeys(symbols.SYMBOLIC, GraphWriter.metadata),
    **dict.fromkeys(
        (operator.attrgetter, operator.itemgetter, operator.methodcaller),
        lambda writer, value: writer.parts(b"getter", *value.__reduce__()),
    ),
    Node: lambda writer, node: writer.parts(b"value", writer.numbered[-1][node]),
    immutable_list: put_list,
    immutable_dict: put_dict,
    torch.Size: lambda writer, value: writer.parts(b"size", *value),
    torch.device: lambda writer, value: writer.parts(b"device", writer.device(value)),
    functools.partial: lambda writer, v: writer.parts(b"partial", v.func, v.args, v.keywords),
    types.FunctionType: _put_function,
    types.MethodType: lambda writer, value: writer.parts(b"method", value.__func__, value.__self__),
    types.ModuleType: lambda writer, value: writer.parts(b"import", value.__name__),
}
_FAMILIES: list[tuple[type, Handler]] = [
    (torch.Tensor, _put_tensor),
    (GraphModule, GraphWriter.put_passed),
    (torch.nn.Module, _put_module),
    *((kind, _put_op) for kind in (OpOverload, OpOverloadPacket, HigherOrderOperator, type)),
    *((kind, _put_op) for kind in (types.BuiltinFunctionType, types.MethodDescriptorType)),
    (types.WrapperDescriptorType, _put_op),
    *FAMILIES,
]
