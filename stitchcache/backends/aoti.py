"""AOTInductor: one shared library a piece, loaded in place by torch's C++ runner.

Private API of torch (``torch._inductor.aot_compile``, ``torch._C._aoti``); tried with 2.11 and
2.13. Loading imports neither ``torch._inductor`` nor ``torch._dynamo``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._ops import OpOverload

from stitchcache.errors import BackendError

if TYPE_CHECKING:
    from stitchcache.backends.base import BoxedPiece

# Namespaces whose ops Inductor knows how to call from C++. Any other op would go through a proxy
# that needs a second file beside the library and is slower than a call from the stitching code.
_NATIVE = {"aten", "prims", "prim", "inductor", "_quantized", "quantized_decomposed"}


class AotiBackend:
    """Stores shared libraries."""

    name = "aoti"
    parallel = True

    def require(self) -> None:
        """Check for a C++ compiler; see :class:`~stitchcache.backends.base.Backend`."""
        # Building needs it, and a warm start builds nothing.
        from stitchcache.backends.toolchain import require_compiler

        require_compiler(self.name)

    def prepare(self, devices: Collection[str]) -> None:
        """Import Inductor and probe the CPU once; forked children inherit both."""

        if "cpu" in devices:
            from torch._inductor.cpu_vec_isa import pick_vec_isa

            pick_vec_isa()

    def foreign_ops(self, piece: torch.fx.GraphModule) -> set[str]:
        """Custom ops: they are called between pieces."""
        return {
            str(node.target).replace(".", "::", 1)
            for node in piece.graph.nodes
            if isinstance(node.target, OpOverload) and node.target.namespace not in _NATIVE
        }

    def build(self, piece: torch.fx.GraphModule, directory: Path, options: Mapping[str, Any]) -> Path:
        """Compile a piece; see :class:`~stitchcache.backends.base.Backend`."""
        import torch._inductor

        fakes = tuple(node.meta["val"] for node in piece.graph.nodes if node.op == "placeholder")
        library = directory / "piece.so"
        settings = {
            **_without_line_tables(),
            **options,
            "aot_inductor.output_path": str(library),
            "aot_inductor.embed_kernel_binary": True,
        }
        with torch.no_grad():
            built = torch._inductor.aot_compile(piece, fakes, options=settings)
        if not isinstance(built, str) or not Path(built).is_file():
            raise BackendError(
                f"AOTInductor returned {built!r} instead of the path of a library. "
                "Remove options that change what it produces (aot_inductor.package*).",
                backend=self.name,
            )
        proxies = _proxies(directory)
        if proxies:
            raise BackendError(
                f"AOTInductor has no C++ entry for {', '.join(proxies)} and wants to call it through a "
                "proxy, which stitchcache does not store. Name it in splitting_ops, or use "
                "backend='inductor' or 'eager'.",
                backend=self.name,
            )
        return Path(built)

    def load(self, path: Path, device: str) -> BoxedPiece:
        """Map a library; see :class:`~stitchcache.backends.base.Backend`."""
        runners = torch._C._aoti
        try:
            if device.startswith("cuda"):
                runner: Any = runners.AOTIModelContainerRunnerCuda(str(path), 1, device)
            else:
                runner = runners.AOTIModelContainerRunnerCpu(str(path), 1)
        except RuntimeError as error:
            raise BackendError(
                f"{path} cannot be loaded: {str(error).splitlines()[0]}. If it lies on a file system "
                "mounted noexec, set STITCHCACHE_DIR to another; else run 'stitchcache verify --repair'.",
                backend=self.name,
            ) from error
        run: BoxedPiece = runner.run
        return run


def _without_line_tables() -> dict[str, bool]:
    """Options that leave debug sections out, where this torch writes them by default.

    They are two thirds of a small library, all of which a warm start reads and digests.
    """
    from torch._inductor import config

    asked = "AOT_INDUCTOR_ENABLE_LINE_TABLES" in os.environ
    default = getattr(config.aot_inductor, "enable_line_tables", False)
    return {"aot_inductor.enable_line_tables": False} if default and not asked else {}


def _proxies(directory: Path) -> list[str]:
    """Ops that a freshly built library would look up in a file beside it."""
    found: dict[str, None] = {}
    for path in sorted(directory.rglob("*.json")):
        record = json.loads(path.read_text())
        # Of the other files of this kind that Inductor leaves, none lists nodes.
        for entry in record.get("nodes", []) if isinstance(record, dict) else []:
            target = str(entry.get("node", {}).get("target", entry.get("name", "an op")))
            found[target.removeprefix("torch.ops.").replace(".", "::", 1)] = None
    return list(found)
