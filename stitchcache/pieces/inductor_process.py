"""Get a process ready for Inductor: what both of its backends do before they compile.

Private API of torch (``torch._inductor``); tried with 2.11 and 2.13.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

from stitchcache.pieces.vector_isa import best_alone, none_at_all, probe_best

# What lowering imports at its first graph; once here instead of once a forked child.
_MODULES = ("torch._inductor.compile_fx", "torch._inductor.graph", "torch._inductor.codegen.cpp")


def import_inductor() -> None:
    """Import what compiling a graph needs."""
    for module in _MODULES:
        try:
            importlib.import_module(module)
        except ImportError:
            # Another torch keeps it elsewhere; compiling imports it then.
            continue


def prepare(devices: Collection[str], options: Mapping[str, Any]) -> None:
    """Import Inductor and probe the CPU; forked children inherit both."""
    import_inductor()
    probe(devices, options)


def probe(devices: Collection[str], options: Mapping[str, Any]) -> None:
    """Leave the probes of the CPU on disk, which takes half of Inductor's imports only."""
    if "cpu" in devices:
        probe_best(options)


def settled(devices: Collection[str], options: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Spare a block that compiles the probes that could not change anything."""
    # What only starts kernels of a GPU gains nothing by the CPU's vector instructions.
    return best_alone(options) if "cpu" in devices else none_at_all(options)
