"""AOTInductor: one shared library a piece, loaded in place by torch's C++ runner. Loading imports neither
Inductor nor Dynamo.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stitchcache.errors import BackendError
from stitchcache.torchside.aoti import load_library
from stitchcache.torchside.ops import OpOverload

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from stitchcache.pieces.base import BoxedPiece

# Namespaces whose ops Inductor knows how to call from C++. Any other op would go through a proxy
# that needs a second file beside the library and is slower than a call from the stitching code.
_NATIVE = {"aten", "prims", "prim", "inductor", "_quantized", "quantized_decomposed"}


class AotiBackend:
    """Stores shared libraries."""

    name = "aoti"
    parallel = True

    def require(self) -> None:
        """Check for a C++ compiler; see :class:`~stitchcache.pieces.base.Backend`."""
        # Building needs it, and a warm start builds nothing.
        from stitchcache.pieces.toolchain import require_compiler

        require_compiler(self.name)

    def wants_warming(self) -> bool:
        """With a compiler, yes."""
        from stitchcache.pieces.toolchain import find_compiler

        return find_compiler() is not None

    def warm(self, devices: Collection[str], options: Mapping[str, Any], before: int) -> None:
        """Leave the probes of the CPU on disk, and the precompiled headers if they are worth it."""
        from stitchcache.pieces.aoti_build import warm

        warm(devices, options, before)

    def prepare(self, devices: Collection[str], options: Mapping[str, Any]) -> None:
        """Import Inductor and probe the CPU once; forked children inherit both."""
        from stitchcache.pieces.inductor_process import prepare

        prepare(devices, options)

    def tuned(
        self, devices: Collection[str], options: Mapping[str, Any], before: int, pieces: int
    ) -> Mapping[str, Any]:
        """Do without precompiled headers where they cost more than they save."""
        from stitchcache.pieces.aoti_build import tuned

        return tuned(devices, options, before, pieces)

    def settled(self, devices: Collection[str], options: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Skip probes that could not change anything."""
        from stitchcache.pieces.inductor_process import settled

        return settled(devices, options)

    def foreign_ops(self, piece: torch.fx.GraphModule) -> set[str]:
        """Custom ops: they are called between pieces."""
        return {
            str(node.target).replace(".", "::", 1)
            for node in piece.graph.nodes
            if isinstance(node.target, OpOverload) and node.target.namespace not in _NATIVE
        }

    def build(self, piece: torch.fx.GraphModule, directory: Path, options: Mapping[str, Any]) -> Path:
        """Compile a piece; see :class:`~stitchcache.pieces.base.Backend`."""
        from stitchcache.pieces.aoti_build import build

        return build(piece, directory, options, self.name)

    def load(self, path: Path, device: str) -> BoxedPiece:
        """Map a library; see :class:`~stitchcache.pieces.base.Backend`."""
        try:
            return load_library(str(path), device)
        except RuntimeError as error:
            raise BackendError(
                f"{path} cannot be loaded: {str(error).splitlines()[0]}. If it lies on a file system "
                "mounted noexec, set STITCHCACHE_DIR to another; else run 'stitchcache verify --repair'.",
                backend=self.name,
            ) from error
