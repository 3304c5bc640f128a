"""Inductor: its two ways to compile a piece into a file, its settings, and what it imports.

Uses ``torch._inductor`` (``aot_compile``, ``standalone_compile``, ``config``) and the modules in
``_MODULES``. Importing this file imports only ``torch``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

SEEN = ("2.11", "2.13")

# What lowering imports at its first graph; once here instead of once a forked child.
_MODULES = ("torch._inductor.compile_fx", "torch._inductor.graph", "torch._inductor.codegen.cpp")


def import_compiler() -> None:
    """Import what compiling a graph needs."""
    for module in _MODULES:
        try:
            importlib.import_module(module)
        except ImportError:
            # Another torch keeps it elsewhere; compiling imports it then.
            continue


def settings() -> Any:
    """Inductor's settings, as attributes; ``patch`` of it sets some for a block."""
    import torch._inductor.config

    return torch._inductor.config


def compile_library(piece: torch.fx.GraphModule, fakes: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Compile a piece with AOTInductor.

    Returns:
        The path of a shared library, or whatever options that change the product make of it.
    """
    import torch._inductor

    with torch.no_grad():
        return torch._inductor.aot_compile(piece, tuple(fakes), options=dict(options))


def compile_artifact(
    piece: torch.fx.GraphModule, fakes: Sequence[Any], options: Mapping[str, Any], path: Path
) -> None:
    """Compile a piece with Inductor, and save what it needs to run into one file."""
    import torch._inductor

    with torch.no_grad():
        artifact = torch._inductor.standalone_compile(
            piece,
            list(fakes),
            dynamic_shapes="from_graph",
            options={"config_patches": dict(options)},
            aot=True,
        )
    artifact.save(path=str(path), format="binary")


def load_artifact(path: Path) -> Any:
    """Load what :func:`compile_artifact` saved, as a function of a piece's inputs."""
    from torch._inductor.standalone_compile import CompiledArtifact

    return CompiledArtifact.load(path=str(path), format="binary")
