"""Ops of a graph: their names, what they write into, who else sees that memory, and which ones are random."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from stitchcache.torchside import QUIET, storage_id
from stitchcache.torchside.ops import HigherOrderOperator, OpOverload, OpOverloadPacket, schema_of

# Ops that update running_mean and running_var although their schemas deny it, and the flag that makes them.
_BATCH_NORMS = "batch_norm native_batch_norm _batch_norm_impl_index cudnn_batch_norm miopen_batch_norm"
_SILENT_WRITERS = {f"aten::{name}": "training" for name in _BATCH_NORMS.split()}
_SILENT_WRITERS["aten::instance_norm"] = "use_input_stats"


def target_name(target: Any) -> str:
    """What a node calls, the same in every process: ``aten::add.Tensor``, or a function's module and name."""
    if isinstance(target, OpOverload):
        return f"{target.namespace}::{str(target).removeprefix(target.namespace + '.')}"
    if isinstance(target, OpOverloadPacket):
        return str(target).replace(".", "::", 1)
    if isinstance(target, HigherOrderOperator):
        return f"higher_order::{target}"
    module = getattr(target, "__module__", None) or type(target).__module__
    kind = type(target).__qualname__
    return f"{module}.{getattr(target, '__qualname__', None) or getattr(target, '__name__', kind)}"


def matches(target: Any, wanted: str) -> bool:
    """Whether a splitting op's name means this target: ``ns::op`` every overload, ``ns.op.overload`` one."""
    name = target_name(target)
    namespace, colons, op = name.partition("::")
    base = op.split(".")[0]
    forms = (f"{namespace}::{base}", f"{namespace}.{base}", f"{namespace}.{op}")
    return wanted == name or (bool(colons) and wanted in forms)


def arguments(node: Node) -> dict[str, Any]:
    """Arguments of a call of an op by the schema's names, defaults included."""
    if not isinstance(node.target, OpOverload):
        return {}
    schema = schema_of(node.target).arguments
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    given.update(zip((a.name for a in schema), node.args, strict=False))
    return given | node.kwargs


def written(node: Node) -> Iterator[Node]:
    """Nodes whose values a node writes into. Graphs that it calls are not looked into."""
    if not isinstance(node.target, OpOverload):
        return
    schema = schema_of(node.target)
    given = arguments(node)
    names = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    flag = _SILENT_WRITERS.get(schema.name)
    if flag is not None and given.get(flag, True):
        names += ["running_mean", "running_var"]
    for name in names:
        value = given.get(name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, Node):
                yield item


def mutates(graph: Graph) -> bool:
    """Whether any op of a graph, or of a graph below it, writes into its arguments."""
    return next(_writes(graph), None) is not None


def _writes(graph: Graph) -> Iterator[Node]:
    for node in graph.nodes:
        yield from written(node)
        for below in called(node):
            yield from _writes(below.graph)


def called(node: Node) -> Iterator[GraphModule]:
    """Graphs that a node calls, or passes to a higher-order op."""
    owner = node.graph.owning_module
    if owner is not None and node.op in {"call_module", "get_attr"}:
        value = attribute_of(owner, str(node.target))
        if isinstance(value, GraphModule):
            yield value


def attribute_of(root: torch.nn.Module, path: str) -> Any:
    """What stands under a dotted path."""
    return attrgetter(path)(root)


def attributes_of(gm: GraphModule, nodes: Iterable[Node]) -> dict[str, Any]:
    """What nodes of a graph read or call by dotted paths, by path."""
    paths = [str(node.target) for node in nodes if node.op in {"get_attr", "call_module"}]
    return {path: attribute_of(gm, path) for path in paths}


def place_attribute(root: torch.nn.Module, path: str, value: Any) -> None:
    """Set what stands under a dotted path, making the modules on the way; of tensors, buffers."""
    *parents, name = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, torch.nn.Module())
        root = root.get_submodule(part)
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        root.register_buffer(name, value)
    else:
        setattr(root, name, value)


def is_random(node: Node) -> bool:
    """Whether a node's result depends on the random number generator."""
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return any(is_random(inner) for below in called(node) for inner in below.graph.nodes)
    given = arguments(node)
    # A comparison of types too: p may be a node.
    return not any(type(given.get(name)) in (bool, int, float) and not given[name] for name in QUIET)


def alias_hazards(split_gm: GraphModule, pieces: Collection[str]) -> set[str]:
    """Find those of these pieces of a split graph that see, or return, memory that is shared and written to.

    A compiler may return a copy where eager returns a view, and takes two inputs for distinct memory.
    Nobody can tell, unless something writes into memory that is seen twice. Where that could happen the
    piece must keep eager's aliasing: it is run op by op instead.
    """
    groups: dict[int | None, set[Node]] = defaultdict(set)
    for node in split_gm.graph.nodes:
        groups[_storage(node)].add(node)
    shared = {storage for storage in _written(split_gm.graph) if len(groups[storage]) > 1}
    hazards = set()
    for node in split_gm.graph.nodes:
        if node.op != "call_module" or node.target not in pieces:
            continue
        inputs = Counter(_storage(source) for source in node.all_input_nodes)
        returns_shared = any(_storage(user) in shared for user in node.users)
        if returns_shared or any(storage in shared and count > 1 for storage, count in inputs.items()):
            hazards.add(str(node.target))
    return hazards


def written_placeholders(gm: GraphModule) -> set[str]:
    """Names of the placeholders whose memory a graph writes to."""
    found = _written(gm.graph)
    return {n.name for n in gm.graph.nodes if n.op == "placeholder" and _storage(n) in found}


def _storage(node: Node) -> int | None:
    """Identity of a fake tensor's storage: fakes of views share it."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        return storage_id(value)
    return None


def _written(graph: Graph) -> set[int | None]:
    """Storages that ops of a graph, or of a graph below it, write to."""
    return set(map(_storage, _writes(graph))) - {None}
