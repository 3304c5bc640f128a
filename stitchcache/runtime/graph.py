"""One of the graphs that ``torch.compile`` captured: what is called in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from stitchcache.codegen import CodeObjects
from stitchcache.runtime import link, run_quietly
from stitchcache.runtime.contract import share_memory
from stitchcache.runtime.model import devices_in
from stitchcache.state import bind_tensors
from stitchcache.types import Artifact


class CompiledGraph:
    """Runs compiled pieces in place of one of Dynamo's graphs.

    Dynamo's guards stand for what the graph relies on, so arguments are not checked again, but for memory
    that arguments share where one of them is written to. Calls run without autograd and autocast.

    Args:
        artifact: What was compiled.
        pieces: Piece key to loaded piece.
        held: Tensors that the graph holds itself, by the names of the artifact's bindings.
        eager: Runs the graph itself, for calls that compiled pieces would get wrong.
        cache_hit: ``"graph"``, or ``None`` if it was compiled now.

    Raises:
        BindError: A held tensor does not fit.
        LinkError: A piece is missing.
    """

    def __init__(
        self,
        artifact: Artifact,
        pieces: Mapping[str, Any],
        held: torch.nn.Module,
        eager: Callable[..., Any],
        cache_hit: str | None,
    ) -> None:
        self.artifact, self.graph_hash, self.cache_hit = artifact, artifact.graph_hash, cache_hit
        function = link(artifact, pieces, bind_tensors(artifact.bindings, held, {}), CodeObjects())
        leaves, passed, buffers = artifact.leaves, list(artifact.taken), list(held.buffers())
        tensors = [i for i, leaf in enumerate(leaves) if leaf.tensor is not None]
        written = [i for i, leaf in enumerate(leaves) if leaf.kind == "inout"]
        device = next((device for device in devices_in(artifact) if device != "cpu"), "cpu")
        grad_enabled, autocast_enabled = torch.is_grad_enabled, torch.is_autocast_enabled
        every = len(passed) == len(leaves)

        def call(*args: Any) -> Any:
            taken = args if every else tuple(args[i] for i in passed)
            if grad_enabled() or autocast_enabled(device):
                return run_quietly(function, device, taken)
            return function(*taken)

        def call_carefully(*args: Any) -> Any:
            """Compiled pieces take what they write to for memory of its own."""
            targets = [args[i] for i in written]
            # A write that autograd does not see would leave it with wrong gradients.
            unseen = grad_enabled() and any(target.requires_grad for target in targets)
            if unseen or share_memory(targets, [*(args[i] for i in tensors), *buffers]):
                return eager(*args)
            return call(*args)

        self._call = call_carefully if written else call

    def __call__(self, *args: Any) -> Any:
        """Run the graph: one value a placeholder to the graph's flat results."""
        return self._call(*args)

    def __repr__(self) -> str:
        return f"<CompiledGraph {self.artifact.label} {self.graph_hash[:12]} {self.cache_hit or 'compiled'}>"


def held_tensors(tensors: Iterable[torch.Tensor]) -> torch.nn.Module:
    """Tensors that a graph holds itself, in the order of the capture, as stitching code knows them."""
    root = torch.nn.Module()
    root.held = torch.nn.Module()
    for index, tensor in enumerate(tensors):
        root.held.register_buffer(str(index), tensor)
    return root
