"""Turn placeholders that the model feeds into attributes that are bound once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import GraphModule

from stitchcache.types import BOUND


def bind_placeholders(
    split_gm: GraphModule, tensors: Mapping[str, tuple[str, torch.Tensor]]
) -> dict[str, str]:
    """Replace placeholders by ``get_attr`` nodes under ``bound.``.

    Args:
        split_gm: A split graph; changed in place.
        tensors: Placeholder name to qualified name in the model, and tensor.

    Returns:
        Attribute path to qualified name, for the placeholders that are used.
    """
    attributes: dict[str, str] = {}
    for node in list(split_gm.graph.nodes):
        if node.op != "placeholder" or node.name not in tensors:
            continue
        if node.users:
            name, tensor = tensors[node.name]
            path = f"{BOUND}.{name}"
            _register(split_gm, path, tensor)
            with split_gm.graph.inserting_before(node):
                attribute = split_gm.graph.get_attr(path)
            attribute.meta = dict(node.meta)
            node.replace_all_uses_with(attribute)
            attributes[path] = name
        split_gm.graph.erase_node(node)
    _placeholders_first(split_gm)
    split_gm.recompile()
    return attributes


def drop_placeholders(split_gm: GraphModule, names: list[str]) -> list[str]:
    """Remove placeholders that nothing uses.

    Args:
        split_gm: A split graph; changed in place.
        names: Placeholders that may go.

    Returns:
        Those that could not go because something uses them.
    """
    kept = []
    for node in list(split_gm.graph.nodes):
        if node.op == "placeholder" and node.name in names:
            if node.users:
                kept.append(node.name)
            else:
                split_gm.graph.erase_node(node)
    split_gm.recompile()
    return kept


def _placeholders_first(split_gm: GraphModule) -> None:
    """fx wants placeholders before everything else."""
    graph = split_gm.graph
    first = next((node for node in graph.nodes if node.op != "placeholder"), None)
    for node in list(graph.nodes):
        if node.op == "placeholder" and first is not None:
            first.prepend(node)


def _register(root: torch.nn.Module, path: str, tensor: torch.Tensor) -> None:
    *parents, name = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, torch.nn.Module())
        root = root.get_submodule(part)
    if isinstance(tensor, torch.nn.Parameter):
        root.register_parameter(name, tensor)
    else:
        root.register_buffer(name, tensor)
