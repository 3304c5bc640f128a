"""How many threads the loops of a piece run on: as many as torch has in the process that calls it.

Inductor writes the number of threads of the compiling process into its C++, and leaves parallel loops out
where that is one. Our children compile on one thread each, and a prewarmed image runs on other machines. So
a piece with enough work is compiled for a number that is settled at run time, and a small one for a single
thread. Options of torch's public Inductor configuration (``cpp.threads``, ``cpp.dynamic_threads``); tried
with 2.11 and 2.13.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch._inductor.config
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from stitchcache.graph.symbols import example_of

ENOUGH = 32768
"""Elements of its largest tensor from which a piece's loops are shared among threads: ATen's own grain size.
Waking a thread takes longer than the loops of a smaller piece do."""

_NOMINAL = 8


def thread_options(piece: GraphModule, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's options for a piece.

    Args:
        piece: Its nodes carry fake tensors in ``meta["val"]``; sizes that may vary count as in the example.
        options: The user's own; what they say of threads is left alone.
    """
    config: Any = torch._inductor.config
    if {"cpp.threads", "cpp.dynamic_threads"} & options.keys() or config.cpp.threads > 0:
        return {}
    if _largest(piece) < ENOUGH:
        return {"cpp.threads": 1}
    # The number decides how many loops are shared; how many threads share them is asked when they run.
    return {"cpp.threads": _NOMINAL, "cpp.dynamic_threads": True}


def _largest(piece: GraphModule) -> int:
    """Elements of the largest tensor that a piece computes: not of its weights, nor of views."""
    found = 0
    for node in piece.graph.nodes:
        if node.op == "call_function" and not _is_view(node):
            value = node.meta.get("val")
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, torch.Tensor):
                    found = max(found, _elements(item))
    return found


def _is_view(node: Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return True
    returns = node.target._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _elements(tensor: torch.Tensor) -> int:
    elements = 1
    for size in tensor.shape:
        example = example_of(size)
        # A size that only data decides may be large.
        elements *= ENOUGH if example is None else example
    return elements
