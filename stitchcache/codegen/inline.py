"""How a call of an inlined graph meets the graph's placeholders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from stitchcache.errors import CodegenError


def takes_placeholders(module: torch.fx.GraphModule) -> bool:
    """Whether a call's arguments are the placeholders' values one to one.

    A graph exported with a pytree signature flattens its arguments first; such a module is called as
    any other.

    Args:
        module: The module.
    """
    probe = [object()]
    inputs = tuple(module.graph.process_inputs(probe))
    return len(inputs) == 1 and inputs[0] is probe


def bind_placeholders(node: torch.fx.Node, graph: torch.fx.Graph) -> Iterator[tuple[torch.fx.Node, Any]]:
    """Match a call's arguments with placeholders, as a Python call would.

    Args:
        node: The ``call_module`` node.
        graph: The graph that it calls.

    Yields:
        Each placeholder with its argument, in graph order.

    Raises:
        CodegenError: An argument is missing or left over.
    """
    args, kwargs = list(node.args), dict(node.kwargs)
    positional = 0
    for placeholder in graph.nodes:
        if placeholder.op != "placeholder":
            continue
        name = str(placeholder.target)
        if name.startswith("**"):
            yield placeholder, kwargs
            kwargs = {}
        elif name.startswith("*"):
            yield placeholder, tuple(args[positional:])
            positional = len(args)
        elif positional < len(args):
            yield placeholder, args[positional]
            positional += 1
        elif name in kwargs:
            yield placeholder, kwargs.pop(name)
        elif placeholder.args:
            yield placeholder, placeholder.args[0]
        else:
            raise CodegenError(f"{node.name}: {node.target} needs an argument {name!r}.", node=node.name)
    if positional < len(args) or kwargs:
        extra = (
            f"{len(args) - positional} more positional"
            if positional < len(args)
            else f"unknown {list(kwargs)}"
        )
        raise CodegenError(f"{node.name}: {node.target} is called with {extra} arguments.", node=node.name)
