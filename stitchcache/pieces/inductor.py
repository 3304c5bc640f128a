"""Inductor's standalone artifacts (``standalone_compile(aot=True)``).

Loading one imports Inductor and, on the CPU, compiles the C++ again where Inductor's own
cache is empty: seconds, and a compiler, where AOTInductor needs neither. It is here for graphs that
AOTInductor refuses.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from stitchcache.pieces import inductor_process
from stitchcache.pieces.base import BoxedPiece
from stitchcache.pieces.threads import thread_options
from stitchcache.pieces.toolchain import find_compiler, require_compiler
from stitchcache.torchside import inductor


class InductorBackend:
    """Stores what ``CompiledArtifact.save`` writes."""

    name = "inductor"
    parallel = True

    def require(self) -> None:
        """Check for a C++ compiler; see :class:`~stitchcache.pieces.base.Backend`."""
        require_compiler(self.name)

    def wants_warming(self) -> bool:
        """With a compiler, yes."""
        return find_compiler() is not None

    def warm(self, devices: Collection[str], options: Mapping[str, Any], before: int) -> None:
        """Leave the probes of the CPU on disk."""
        inductor_process.probe(devices, options)

    def prepare(self, devices: Collection[str], options: Mapping[str, Any]) -> None:
        """Import Inductor and probe the CPU once."""
        inductor_process.prepare(devices, options)

    def tuned(
        self, devices: Collection[str], options: Mapping[str, Any], before: int, pieces: int
    ) -> Mapping[str, Any]:
        """The same options for any number."""
        return options

    def settled(self, devices: Collection[str], options: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Skip probes that could not change anything."""
        return inductor_process.settled(devices, options)

    def foreign_ops(self, piece: torch.fx.GraphModule) -> set[str]:
        """Inductor calls any registered op."""
        return set()

    def build(self, piece: torch.fx.GraphModule, directory: Path, options: Mapping[str, Any]) -> Path:
        """Compile a piece; see :class:`~stitchcache.pieces.base.Backend`."""
        fakes = [node.meta["val"] for node in piece.graph.nodes if node.op == "placeholder"]
        path = directory / "piece.inductor"
        inductor.compile_artifact(piece, fakes, {**thread_options(piece, options), **options}, path)
        return path

    def load(self, path: Path, device: str) -> BoxedPiece:
        """Load an artifact; see :class:`~stitchcache.pieces.base.Backend`."""
        artifact = inductor.load_artifact(path)

        def run(inputs: list[Any]) -> Any:
            return artifact(*inputs)

        return run
