"""Ops of a graph: their names, what they write into, who else sees that memory, and which ones are random."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from stitchcache.torchside.ops import HigherOrderOperator, OpOverload, OpOverloadPacket, schema_of
from stitchcache.torchside.tensors import storage_id

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


def target_name(target: Any) -> str:
    """A name for the target of a ``call_function`` node that is the same in every process.

    ``aten::add.Tensor`` for ops, ``module.qualname`` for functions.
    """
    if isinstance(target, OpOverload):
        return f"{target.namespace}::{str(target).removeprefix(target.namespace + '.')}"
    if isinstance(target, OpOverloadPacket):
        return str(target).replace(".", "::", 1)
    if isinstance(target, HigherOrderOperator):
        return f"higher_order::{target}"
    module = getattr(target, "__module__", None) or type(target).__module__
    kind = type(target).__qualname__
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", kind)
    return f"{module}.{name}"


def matches(target: Any, wanted: str) -> bool:
    """Whether a splitting op's name, as a user writes it, means this target.

    ``ns::op`` means every overload, ``ns::op.overload`` one; a dot may stand for the colons.
    """
    name = target_name(target)
    if name == wanted:
        return True
    if "::" not in name:
        return False
    namespace, _, op = name.partition("::")
    base = op.split(".")[0]
    return wanted in {f"{namespace}::{base}", f"{namespace}.{base}", f"{namespace}.{op}"}


def ops_in(gm: torch.fx.GraphModule) -> list[str]:
    """Names of all ops that a graph calls, most frequent first."""
    counts = Counter(target_name(n.target) for n in gm.graph.nodes if n.op == "call_function")
    return [name for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


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


def alias_hazards(split_gm: GraphModule, pieces: Collection[str]) -> set[str]:
    """Find pieces that see, or return, memory that is shared and written to.

    A compiler may return a copy where eager returns a view, and takes two inputs for distinct memory.
    Nobody can tell, unless something writes into memory that is seen twice. Where that could happen the
    piece is run op by op instead.

    Args:
        split_gm: A split graph whose values carry fake tensors.
        pieces: Submodules that would be compiled.

    Returns:
        Names of the pieces that must keep eager's aliasing.
    """
    groups: dict[int, set[Node]] = defaultdict(set)
    for node in split_gm.graph.nodes:
        storage = _storage(node)
        if storage is not None:
            groups[storage].add(node)
    shared = {storage for storage in _written(split_gm.graph) if len(groups.get(storage, ())) > 1}
    hazards = set()
    for node in split_gm.graph.nodes:
        if node.op != "call_module" or node.target not in pieces:
            continue
        outputs = [user for user in node.users if _storage(user) in shared]
        inputs = Counter(_storage(source) for source in node.all_input_nodes)
        if outputs or any(storage in shared and count > 1 for storage, count in inputs.items()):
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


def _written(graph: Graph) -> set[int]:
    """Storages that ops of a graph, or of a graph below it, write to."""
    found = set()
    for node in graph.nodes:
        for target in written(node):
            storage = _storage(target)
            if storage is not None:
                found.add(storage)
        for below in called(node):
            found |= _written(below.graph)
    return found
