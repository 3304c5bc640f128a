"""How many threads the loops of a piece run on: as many as torch has in the process that calls it.

Inductor writes the number of threads of the compiling process into its C++, and leaves parallel loops out
where that is one. Our children compile on one thread each, and a prewarmed image runs on other machines. So
a piece that can be given enough work is compiled for a number that is settled at run time, and one that is
always small for a single thread. What it can be given is what its sizes' ranges allow. The example does not
count: it is in no key, so whoever compiled first would decide for all others. Options of torch's public
Inductor configuration (``cpp.threads``, ``cpp.dynamic_threads``); tried with 2.11 and 2.13.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from stitchcache.graph.symbols import finite
from stitchcache.torchside import inductor
from stitchcache.torchside.ops import OpOverload, is_view
from stitchcache.torchside.symbols import known_range

ENOUGH = 32768
"""Elements that its largest tensor can have from which a piece's loops are shared among threads: ATen's own
grain size. Waking a thread takes longer than the loops of a smaller piece do."""

_NOMINAL = 8


def thread_options(piece: GraphModule, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's options for a piece.

    Args:
        piece: Its nodes carry fake tensors in ``meta["val"]``; a size that may vary counts as the largest
            that the capture allows.
        options: The user's own; what they say of threads is left alone.
    """
    if {"cpp.threads", "cpp.dynamic_threads"} & options.keys() or inductor.settings().cpp.threads > 0:
        return {}
    if _largest(piece) < ENOUGH:
        return {"cpp.threads": 1}
    # Inductor then shares the outermost loops of each kernel, and asks how many threads when they run; the
    # number here decides how deep that goes.
    return {"cpp.threads": _NOMINAL, "cpp.dynamic_threads": True}


def _largest(piece: GraphModule) -> int:
    """Elements of the largest tensor that a piece can compute: not of its weights, nor of views."""
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
    return is_view(node.target)


def _elements(tensor: torch.Tensor) -> int:
    return math.prod(_most(size) for size in tensor.shape)


def _most(size: int | torch.SymInt) -> int:
    if not isinstance(size, torch.SymInt):
        return size
    top = finite(known_range(size)[1])
    # Without a bound, or where only data decides, it may be large.
    return ENOUGH if top is None else top
