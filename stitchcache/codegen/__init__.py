"""Source code for stitching graphs, and callables from source code."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stitchcache.codegen.execution import compile_execution_fn as compile_execution_fn
    from stitchcache.codegen.generate import generate_execution_code as generate_execution_code

# A warm start needs a few of these, and importing the rest takes longer than its own work.
_HOMES = {
    "compile_execution_fn": "stitchcache.codegen.execution",
    "generate_execution_code": "stitchcache.codegen.generate",
}
__all__ = ["compile_execution_fn", "generate_execution_code"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
