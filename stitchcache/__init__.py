"""Compile PyTorch models ahead of time, piece by piece, into an on-disk cache.

Importing this package imports nothing else of it: every public name is looked up when it is first used.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stitchcache import errors as errors
    from stitchcache.api.blocks import CompiledBlocks as CompiledBlocks, compile_blocks as compile_blocks
    from stitchcache.api.compile import compile as compile, load as load
    from stitchcache.api.engine import load_execution as load_execution, save_execution as save_execution
    from stitchcache.api.preload import Preloaded as Preloaded, preload as preload
    from stitchcache.api.prewarm import PrewarmReport as PrewarmReport, Target as Target, prewarm as prewarm
    from stitchcache.artifact.unpickle import register_const_type as register_const_type
    from stitchcache.cache import Cache as Cache
    from stitchcache.codegen import compile_execution_fn as compile_execution_fn
    from stitchcache.codegen.generate import generate_execution_code as generate_execution_code
    from stitchcache.explanation import Explanation as Explanation
    from stitchcache.graph.canonical import graph_hash as graph_hash
    from stitchcache.graph.split import SplitItem as SplitItem, split_graph as split_graph
    from stitchcache.options import (
        CudaGraphs as CudaGraphs,
        Dim as Dim,
        Secret as Secret,
        SizeRange as SizeRange,
    )
    from stitchcache.pipeline.find import Progress as Progress
    from stitchcache.pipeline.look import verify as verify
    from stitchcache.runtime.model import CompiledModel as CompiledModel
    from stitchcache.types import Artifact as Artifact, Check as Check

__version__ = "0.2.0"

_HOMES = {
    "api.blocks": "CompiledBlocks compile_blocks",
    "api.compile": "compile load",
    "api.engine": "load_execution save_execution",
    "api.preload": "Preloaded preload",
    "api.prewarm": "PrewarmReport Target prewarm",
    "artifact.unpickle": "register_const_type",
    "cache": "Cache",
    "codegen": "compile_execution_fn",
    "codegen.generate": "generate_execution_code",
    "explanation": "Explanation",
    "graph.canonical": "graph_hash",
    "graph.split": "SplitItem split_graph",
    "options": "CudaGraphs Dim Secret SizeRange",
    "pipeline.find": "Progress",
    "pipeline.look": "verify",
    "runtime.model": "CompiledModel",
    "types": "Artifact Check",
}
_HOME_OF = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names.split()}

__all__ = [*sorted([*_HOME_OF, "errors"]), "__version__"]


def __getattr__(name: str) -> Any:
    with collection_paused():
        if name == "errors":
            return importlib.import_module("stitchcache.errors")
        if name not in _HOME_OF:
            raise AttributeError(f"module 'stitchcache' has no attribute {name!r}")
        return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@contextmanager
def collection_paused() -> Iterator[None]:
    """Keep the cyclic collector from running for the length of the block.

    A warm start makes thousands of objects that go again at once, and its imports thousands that stay. They
    count towards the next full collection all the same, and with torch imported that one takes longer than
    the whole start. The switch is the process's: a thread that finds it off leaves it off.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        # What is left of the block is put among the old objects at once, which brings no full collection
        # nearer. Looking through it first (``gc.collect(0)``) takes a twentieth of a warm start. Whoever has
        # frozen objects, before a fork say, keeps them so.
        if gc.get_freeze_count():
            gc.collect(0)
        else:
            gc.freeze()
            gc.unfreeze()
        gc.enable()
