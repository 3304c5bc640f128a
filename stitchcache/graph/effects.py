"""What ops do beyond returning values: write into arguments, draw random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from stitchcache.torchside.ops import OpOverload, schema_of

# Ops that update running statistics although their schemas deny it: name to the arguments that they
# write, and the flag that makes them.
_SILENT_WRITERS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "aten::batch_norm": (("running_mean", "running_var"), "training"),
    "aten::native_batch_norm": (("running_mean", "running_var"), "training"),
    "aten::_batch_norm_impl_index": (("running_mean", "running_var"), "training"),
    "aten::cudnn_batch_norm": (("running_mean", "running_var"), "training"),
    "aten::miopen_batch_norm": (("running_mean", "running_var"), "training"),
    "aten::instance_norm": (("running_mean", "running_var"), "use_input_stats"),
}
# Arguments that make an op of the random kind a plain one, with the values that do.
_QUIET: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("dropout_p", (0, 0.0)),
    ("p", (0, 0.0)),
    ("dropout", (0, 0.0)),
    ("train", (False,)),
    ("training", (False,)),
)


def arguments(node: Node) -> dict[str, Any]:
    """Arguments of a call of an op by the schema's names, defaults included."""
    if not isinstance(node.target, OpOverload):
        return {}
    schema = schema_of(node.target).arguments
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    given.update(zip((a.name for a in schema), node.args, strict=False))
    given.update(node.kwargs)
    return given


def written(node: Node) -> Iterator[Node]:
    """Nodes whose values a node writes into. Graphs that it calls are not looked into."""
    if not isinstance(node.target, OpOverload):
        return
    schema = schema_of(node.target)
    given = arguments(node)
    names, flag = _SILENT_WRITERS.get(schema.name, ((), ""))
    if not given.get(flag, True):
        names = ()
    if schema.is_mutable:
        names = tuple(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    for name in names:
        value = given.get(name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, Node):
                yield item


def mutates(graph: Graph) -> bool:
    """Whether any op of a graph, or of a graph below it, writes into its arguments."""
    if any(next(written(node), None) is not None for node in graph.nodes):
        return True
    return any(mutates(below.graph) for node in graph.nodes for below in called(node))


def called(node: Node) -> Iterator[GraphModule]:
    """Graphs that a node calls, or passes to a higher-order op."""
    owner = node.graph.owning_module
    if owner is None or node.op not in {"call_module", "get_attr"}:
        return
    value = attribute_of(owner, str(node.target))
    if isinstance(value, GraphModule):
        yield value


def attribute_of(root: torch.nn.Module, path: str) -> Any:
    """What stands under a dotted path."""
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


def is_random(node: Node) -> bool:
    """Whether a node's result depends on the random number generator."""
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return any(is_random(inner) for below in called(node) for inner in below.graph.nodes)
    given = arguments(node)
    # A comparison of types too: p may be a node.
    return not any(
        name in given and type(given[name]) in (bool, int, float) and given[name] in values
        for name, values in _QUIET
    )
