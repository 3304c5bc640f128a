"""Compile PyTorch models ahead of time, piece by piece, into an on-disk cache.

Importing this package imports nothing else: every public name is looked up when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stitchcache import errors as errors
    from stitchcache.api.compile import compile as compile
    from stitchcache.api.load import load as load
    from stitchcache.api.preload import Preloaded as Preloaded
    from stitchcache.api.preload import preload as preload
    from stitchcache.api.prewarm import PrewarmReport as PrewarmReport
    from stitchcache.api.prewarm import prewarm as prewarm
    from stitchcache.api.target import Target as Target
    from stitchcache.artifact.globals import register_const_type as register_const_type
    from stitchcache.artifact.record import Artifact as Artifact
    from stitchcache.cache import Cache as Cache
    from stitchcache.codegen.execution import compile_execution_fn as compile_execution_fn
    from stitchcache.codegen.generate import generate_execution_code as generate_execution_code
    from stitchcache.explanation import Explanation as Explanation
    from stitchcache.graph.canonical import graph_hash as graph_hash
    from stitchcache.graph.split import SplitItem as SplitItem
    from stitchcache.graph.split import split_graph as split_graph
    from stitchcache.pipeline.look import verify as verify
    from stitchcache.runtime.model import CompiledModel as CompiledModel
    from stitchcache.types import Check as Check
    from stitchcache.types import Dim as Dim
    from stitchcache.types import SizeRange as SizeRange

__version__ = "0.2.0"

_HOMES = {
    "Artifact": "stitchcache.artifact.record",
    "Cache": "stitchcache.cache",
    "Check": "stitchcache.types",
    "CompiledModel": "stitchcache.runtime.model",
    "Dim": "stitchcache.types",
    "Explanation": "stitchcache.explanation",
    "Preloaded": "stitchcache.api.preload",
    "PrewarmReport": "stitchcache.api.prewarm",
    "SizeRange": "stitchcache.types",
    "SplitItem": "stitchcache.graph.split",
    "Target": "stitchcache.api.target",
    "compile": "stitchcache.api.compile",
    "compile_execution_fn": "stitchcache.codegen.execution",
    "errors": "stitchcache.errors",
    "generate_execution_code": "stitchcache.codegen.generate",
    "graph_hash": "stitchcache.graph.canonical",
    "load": "stitchcache.api.load",
    "preload": "stitchcache.api.preload",
    "prewarm": "stitchcache.api.prewarm",
    "register_const_type": "stitchcache.artifact.globals",
    "split_graph": "stitchcache.graph.split",
    "verify": "stitchcache.pipeline.look",
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'stitchcache' has no attribute {name!r}")
    from stitchcache.pause import collection_paused

    with collection_paused():
        module = importlib.import_module(home)
    return module if name == "errors" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
