"""The graph hash: equal for equal graphs in any process, different for anything that matters.

A graph is written as a tagged, length-prefixed byte string and hashed. Nodes are numbered by
position and symbols by first appearance, so the names of nodes, placeholders and symbols do not
count; neither do stack traces, device indices, or anything about the process. What counts: node
kinds, targets, arguments (values with their exact types), the dtype, shape, strides and device type
of every value, ranges of symbols, relations between them, and the values of constant tensors.
"""

from __future__ import annotations

import enum
import hashlib
import pickle
import struct
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

from stitchcache.errors import SplitError
from stitchcache.graph import symbols
from stitchcache.graph.opnames import target_name
from stitchcache.types import Factor

SCHEMA = b"stitchcache graph 1"


def graph_hash(split_gm: torch.fx.GraphModule, factors: Iterable[Factor] = ()) -> str:
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
    writer = _Writer()
    writer.bytes(SCHEMA)
    writer.graph_module(split_gm)
    for factor in sorted(factors, key=lambda f: f.name):
        writer.text("factor")
        writer.text(factor.name)
        writer.text(factor.digest)
    return writer.hexdigest()


class _Writer:
    """Feeds a hash with length-prefixed, tagged values."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._symbols = symbols.SymbolNames()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def bytes(self, data: bytes) -> None:
        self._hash.update(struct.pack("<q", len(data)))
        self._hash.update(data)

    def text(self, value: str) -> None:
        self.bytes(value.encode("utf-8", "surrogatepass"))

    def tag(self, name: str, count: int) -> None:
        self.text(name)
        self._hash.update(struct.pack("<q", count))

    def graph_module(self, gm: torch.fx.GraphModule) -> None:
        self.tag("graph", len(gm.graph.nodes))
        numbers: dict[torch.fx.Node, int] = {}
        for number, node in enumerate(gm.graph.nodes):
            numbers[node] = number
            self.text(node.op)
            self._target(gm, node)
            self.argument(gm, node.args, numbers)
            self.argument(gm, dict(node.kwargs), numbers)
            self.value(node.meta.get("val"))
        self._symbol_facts(symbols.shape_environment(gm.graph))

    def _target(self, gm: torch.fx.GraphModule, node: torch.fx.Node) -> None:
        if node.op == "call_function":
            self.function(node.target)
        elif node.op == "call_method":
            self.text(str(node.target))
        elif node.op == "call_module":
            self.submodule(gm.get_submodule(str(node.target)))
        elif node.op == "get_attr":
            self._attribute(gm, str(node.target))

    def _attribute(self, gm: torch.fx.GraphModule, path: str) -> None:
        owner, _, name = path.rpartition(".")
        value = getattr(gm.get_submodule(owner), name)
        if isinstance(value, torch.fx.GraphModule):
            self.text("graph attribute")
            self.graph_module(value)
        elif path in dict(gm.named_parameters()) or path in dict(gm.named_buffers()):
            # Bound by name when the code runs, so the name is part of what is built.
            self.text("bound attribute")
            self.text(path)
            self.value(value)
        else:
            self.text("constant attribute")
            self.argument(gm, value, {})

    def submodule(self, module: torch.nn.Module) -> None:
        if isinstance(module, torch.fx.GraphModule):
            self.graph_module(module)
            return
        self.text(f"module {type(module).__module__}.{type(module).__qualname__}")
        self.text(repr(sorted(n for n, _ in module.named_parameters())))
        self.text(getattr(module, "stitchcache_key", module.extra_repr()))

    def function(self, target: Any) -> None:
        self.text(target_name(target))
        if isinstance(target, types.FunctionType):
            self.code(target.__code__)
        schema = getattr(target, "_schema", None)
        if schema is not None:
            self.text(str(schema))

    def code(self, code: types.CodeType) -> None:
        self.bytes(code.co_code)
        self.text(repr((code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)))
        for const in code.co_consts:
            if isinstance(const, types.CodeType):
                self.code(const)
            else:
                self.text(repr(const))

    def argument(self, gm: torch.fx.GraphModule, value: Any, numbers: dict[torch.fx.Node, int]) -> None:
        """Write one argument of a node, containers recursively."""

        def many(name: str, items: list[Any]) -> None:
            self.tag(name, len(items))
            for item in items:
                self.argument(gm, item, numbers)

        if isinstance(value, torch.fx.Node):
            self.tag("node", numbers[value])
        elif isinstance(value, torch.Tensor):
            self.tensor_value(value)
        elif type(value) in (list, tuple) or isinstance(value, (list, tuple)):
            many(f"{type(value).__module__}.{type(value).__qualname__}", list(value))
        elif isinstance(value, dict):
            many(type(value).__qualname__, [part for pair in value.items() for part in pair])
        elif isinstance(value, slice):
            many("slice", [value.start, value.stop, value.step])
        elif isinstance(value, symbols.SYMBOLIC):
            self.value(value)
        else:
            self.scalar(value)

    def scalar(self, value: Any) -> None:
        """Write a value that is not a container."""
        kind = type(value)
        writers: dict[type, Callable[[Any], str | bytes]] = {
            float: lambda v: struct.pack("<d", v),
            complex: lambda v: struct.pack("<dd", v.real, v.imag),
            bytes: lambda v: v,
            torch.device: lambda v: v.type,
        }
        self.text(f"{kind.__module__}.{kind.__qualname__}")
        if kind in writers:
            data = writers[kind](value)
            self.bytes(data if isinstance(data, bytes) else data.encode())
        elif kind in _PLAIN or value is None or value is Ellipsis:
            self.text(repr(value))
        elif isinstance(value, enum.Enum):
            self.text(value.name)
        elif callable(value) and not isinstance(value, torch.nn.Module):
            self.function(value)
        else:
            self.opaque(value)

    def opaque(self, value: Any) -> None:
        try:
            self.bytes(pickle.dumps(value, protocol=4))
        except (pickle.PicklingError, TypeError, AttributeError, NotImplementedError) as error:
            raise SplitError(
                f"an argument of type {type(value).__qualname__} has no canonical form ({error}); "
                "the graph cannot be hashed. Pass a picklable value."
            ) from error

    def tensor_value(self, value: torch.Tensor) -> None:
        """Write a constant tensor, contents included."""
        self.value(value)
        plain = value.detach().cpu().contiguous().flatten()
        self.bytes(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")

    def value(self, value: Any) -> None:
        """Write what is known of a value: never its contents."""
        if isinstance(value, torch.Tensor):
            self.text(f"{value.dtype} {value.device.type} {value.layout}")
            self.sizes(value.shape)
            self.sizes(symbols.stride_of(value))
        elif isinstance(value, (list, tuple)):
            self.tag("values", len(value))
            for item in value:
                self.value(item)
        elif isinstance(value, symbols.SYMBOLIC):
            self.text(f"{type(value).__name__} {self._symbols.rename(symbols.expression(value))}")
        elif value is None:
            self.text("unknown")
        else:
            self.text(
                f"{type(value).__qualname__} {value!r}"[:200]
                if type(value) in _PLAIN
                else type(value).__qualname__
            )

    def sizes(self, sizes: Iterable[Any]) -> None:
        self.text(" ".join(str(self._symbols.size(size)) for size in sizes))

    def _symbol_facts(self, shape_env: Any | None) -> None:
        if shape_env is None:
            return
        for symbol, name in list(self._symbols.items()):
            self.text(f"{name} {symbols.bounds(shape_env, symbol)}")
        for guard in symbols.guards(shape_env, self._symbols, only_known=True):
            self.text(guard)


_PLAIN = {bool, int, str, torch.dtype, torch.layout, torch.memory_format, torch.Size, range}
