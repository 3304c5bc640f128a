"""Find pieces whose results must alias what eager execution would alias.

A compiler may return a copy where eager returns a view. Nobody can tell, unless something writes
into one of the two afterwards. Where that could happen the piece is run op by op instead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node


def alias_hazards(split_gm: GraphModule, pieces: Collection[str]) -> set[str]:
    """Pieces that return a tensor of a group that shares storage and is written to.

    Args:
        split_gm: A split graph whose values carry fake tensors.
        pieces: Submodules that would be compiled.

    Returns:
        Names of the pieces that must keep eager's aliasing.
    """
    groups: dict[int, set[Node]] = defaultdict(set)
    written: set[int] = set()
    for node in split_gm.graph.nodes:
        storage = _storage(node)
        if storage is not None:
            groups[storage].add(node)
        called = split_gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(called, GraphModule):
            written |= _written(called.graph)
    written |= _written(split_gm.graph)
    hazards = set()
    for storage in written:
        members = groups.get(storage, set())
        if len(members) < 2:
            continue
        for node in members:
            source = node.args[0] if node.args else None
            if isinstance(source, Node) and source.op == "call_module" and source.target in pieces:
                hazards.add(str(source.target))
    return hazards


def _storage(node: Node) -> int | None:
    """Identity of a fake tensor's storage: fakes of views share it."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        return int(value.untyped_storage()._cdata)
    return None


def _written(graph: torch.fx.Graph) -> set[int]:
    """Storages that ops of a graph write to."""
    found = set()
    for node in graph.nodes:
        if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
            continue
        given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | dict(
            node.kwargs
        )
        for argument in node.target._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = given.get(argument.name)
                for written in value if isinstance(value, (list, tuple)) else [value]:
                    storage = _storage(written) if isinstance(written, Node) else None
                    if storage is not None:
                        found.add(storage)
    return found
