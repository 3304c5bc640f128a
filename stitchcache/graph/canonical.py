"""The graph hash: equal for equal graphs in any process, different for anything that matters.

A graph is written as a tagged, length-prefixed byte string and hashed. Nodes are numbered by
position, symbols and devices of one type by first appearance, so the names of nodes, placeholders and
symbols do not count; neither do stack traces, device indices, or anything about the process. What
counts: node kinds, targets, arguments (values with their exact types), the dtype, shape, strides and
device of every value, ranges of symbols, relations between them, and the values of constant tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from stitchcache.encoding import UnkeyableError
from stitchcache.errors import SplitError
from stitchcache.graph import symbols
from stitchcache.graph.effects import attribute_of
from stitchcache.graph.encoding import Encoder
from stitchcache.types import Factor

SCHEMA = "stitchcache graph 4"


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
    writer = _GraphWriter()
    listed = sorted(factors, key=lambda factor: factor.name)
    try:
        writer.text(SCHEMA)
        writer.graph_module(split_gm)
        writer.named(b"factors", [(factor.name, factor.digest) for factor in listed])
    except UnkeyableError as error:
        raise SplitError(
            f"the graph cannot be hashed: {error}. Pass plain values, tensors or picklable objects to the op."
        ) from error
    return writer.hexdigest()


class _GraphWriter(Encoder):
    """Writes graphs; the values in them are its base's business."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: list[dict[torch.fx.Node, int]] = []
        self._passed = 0

    def graph_module(self, gm: torch.fx.GraphModule) -> None:
        nodes = list(gm.graph.nodes)
        self.head(b"graph", len(nodes) + 2)
        numbers: dict[torch.fx.Node, int] = {}
        self._numbers.append(numbers)
        for number, node in enumerate(nodes):
            numbers[node] = number
            self.head(b"node", 5)
            self.text(node.op)
            self._target(gm, node)
            self.put_at(f".{node.name}.args", node.args)
            self.put_at(f".{node.name}.kwargs", dict(sorted(node.kwargs.items())))
            self.metadata(symbols.value_of(node))
        self._numbers.pop()
        self._symbol_facts(symbols.shape_environment(gm.graph))

    def put(self, value: Any) -> None:
        """Write one argument; nodes of the graph at hand by their position."""
        if isinstance(value, torch.fx.Node):
            self.parts(b"value", self._numbers[-1][value])
        elif isinstance(value, torch.fx.GraphModule):
            self._passed += 1
            self.graph_module(value)
            self._passed -= 1
        else:
            super().put(value)

    def _target(self, gm: torch.fx.GraphModule, node: torch.fx.Node) -> None:
        if node.op == "call_function":
            self.put_at(f".{node.name}.target", node.target)
        elif node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            # Not put: what a graph holds that is called is bound by name, as its caller's tensors are.
            if isinstance(module, torch.fx.GraphModule):
                self.graph_module(module)
            else:
                self.put_at(f".{node.target}", module)
        elif node.op == "get_attr":
            self._attribute(gm, str(node.target))
        else:
            self.put(str(node.target) if node.op == "call_method" else None)

    def _attribute(self, gm: torch.fx.GraphModule, path: str) -> None:
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

    def _symbol_facts(self, shape_env: Any | None) -> None:
        """What compilers know about the symbols met so far: ranges, and relations between them."""
        known = [symbol for symbol, _ in self.symbols.items()] if shape_env is not None else []
        self.parts(b"symbols", *(symbols.bounds(shape_env, symbol) for symbol in known))
        relations = symbols.relations(shape_env, self.symbols) if shape_env is not None else []
        self.parts(b"relations", *sorted(relations))


__all__ = ["SCHEMA", "SplitError", "graph_hash"]
