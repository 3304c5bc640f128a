"""Find pieces whose values must alias what eager execution would alias.

A compiler may return a copy where eager returns a view, and takes two inputs for distinct memory.
Nobody can tell, unless something writes into memory that is seen twice. Where that could happen the
piece is run op by op instead.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection

import torch
from torch.fx import Graph, GraphModule, Node

from stitchcache.graph import effects
from stitchcache.torchside.tensors import storage_id


def alias_hazards(split_gm: GraphModule, pieces: Collection[str]) -> set[str]:
    """Pieces that see, or return, memory that is shared and written to.

    Args:
        split_gm: A split graph whose values carry fake tensors.
        pieces: Submodules that would be compiled.

    Returns:
        Names of the pieces that must keep eager's aliasing.
    """
    groups: dict[int, set[Node]] = defaultdict(set)
    written = _written(split_gm.graph)
    for node in split_gm.graph.nodes:
        storage = _storage(node)
        if storage is not None:
            groups[storage].add(node)
        for below in effects.called(node):
            written |= _written(below.graph)
    shared = {storage for storage in written if len(groups.get(storage, ())) > 1}
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
    written = _written(gm.graph)
    return {n.name for n in gm.graph.nodes if n.op == "placeholder" and _storage(n) in written}


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
        for target in effects.written(node):
            storage = _storage(target)
            if storage is not None:
                found.add(storage)
        for below in effects.called(node):
            found |= _written(below.graph)
    return found
