"""Source code for stitching graphs, and callables from source code."""

from stitchcache.codegen.execution import compile_execution_fn
from stitchcache.codegen.generate import generate_execution_code

__all__ = ["compile_execution_fn", "generate_execution_code"]
