"""Get a process ready for Inductor: what both of its backends do before they compile."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

from stitchcache.torchside.inductor import import_compiler
from stitchcache.torchside.vector_isa import best_alone, none_at_all, probe_best


def prepare(devices: Collection[str], options: Mapping[str, Any]) -> None:
    """Import Inductor and probe the CPU; forked children inherit both."""
    import_compiler()
    probe(devices, options)


def probe(devices: Collection[str], options: Mapping[str, Any]) -> None:
    """Leave the probes of the CPU on disk, which takes half of Inductor's imports only."""
    if "cpu" in devices:
        probe_best(options)


def settled(devices: Collection[str], options: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Spare a block that compiles the probes that could not change anything."""
    # What only starts kernels of a GPU gains nothing by the CPU's vector instructions.
    return best_alone(options) if "cpu" in devices else none_at_all(options)
