"""AOTInductor: one shared library a piece, loaded in place by torch's C++ runner.

Private API of torch (``torch._inductor.aot_compile``, ``torch._C._aoti``); tried with 2.11 and
2.13. Loading imports neither ``torch._inductor`` nor ``torch._dynamo``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload

from stitchcache.backends import inductor_process
from stitchcache.backends.base import BoxedPiece
from stitchcache.backends.headers import precompile
from stitchcache.backends.toolchain import find_compiler, require_compiler
from stitchcache.errors import BackendError

# Namespaces whose ops Inductor knows how to call from C++. Any other op would go through a proxy
# that needs a second file beside the library and is slower than a call from the stitching code.
_NATIVE = {"aten", "prims", "prim", "inductor", "_quantized", "quantized_decomposed"}


class AotiBackend:
    """Stores shared libraries."""

    name = "aoti"
    parallel = True

    def require(self) -> None:
        """Check for a C++ compiler; see :class:`~stitchcache.backends.base.Backend`."""
        require_compiler(self.name)

    def wants_warming(self) -> bool:
        """With a compiler, yes."""
        return find_compiler() is not None

    def warm(self, devices: Collection[str], options: Mapping[str, Any]) -> None:
        """Leave the probes of the CPU and the precompiled headers on disk."""
        inductor_process.prepare(devices, options)
        inductor_process.settle(devices, options)
        if "cpu" in devices:
            from torch._inductor import config

            with config.patch(_settings(options)):
                precompile()

    def prepare(self, devices: Collection[str], options: Mapping[str, Any]) -> None:
        """Import Inductor and probe the CPU once; forked children inherit both."""
        inductor_process.prepare(devices, options)

    def settle(self, devices: Collection[str], options: Mapping[str, Any]) -> None:
        """Skip probes that could not change anything."""
        inductor_process.settle(devices, options)

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
        settings = {**_settings(options), "aot_inductor.output_path": str(library)}
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


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The user's options, and what ours are."""
    import torch._inductor

    settings = {**options, "aot_inductor.embed_kernel_binary": True}
    # Line numbers of sources that are gone by then: they cost a tenth of the C++ time, and more than
    # half of the file. Not in every torch.
    if hasattr(torch._inductor.config.aot_inductor, "enable_line_tables"):
        settings.setdefault("aot_inductor.enable_line_tables", False)
    return settings


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
