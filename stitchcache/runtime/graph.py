"""The callable that ``torch.compile`` calls instead of one of its graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from stitchcache.artifact.record import Artifact
from stitchcache.errors import BackendError, EntryFormatError, InputMismatchError
from stitchcache.runtime.bind import bind_tensors
from stitchcache.runtime.call import run_quietly
from stitchcache.runtime.link import link
from stitchcache.runtime.mismatch import share_memory
from stitchcache.runtime.saved import SavedGraph, dump_graph, load_blobs, load_graph
from stitchcache.torchside.dynamo import SerializableCallable
from stitchcache.types import BlobRef


class CompiledGraph(SerializableCallable):
    """Runs compiled pieces in place of one of Dynamo's graphs.

    Dynamo's guards stand for what the graph relies on, so arguments are not checked again, but for memory
    that arguments share where one of them is written to. Calls run without autograd and autocast.

    Attributes:
        graph_hash: Names the artifact.
        artifact: What was compiled.
        cache_hit: ``"graph"``, or ``None`` if it was compiled now.
    """

    def __init__(
        self,
        artifact: Artifact,
        pieces: Mapping[str, Any],
        held: torch.nn.Module,
        *,
        cache_hit: str | None,
        read_blob: Callable[[BlobRef], bytes],
        eager: Callable[..., Any] | None = None,
    ) -> None:
        """Link a graph.

        Args:
            artifact: What was compiled.
            pieces: Piece key to loaded piece.
            held: Tensors that the graph holds itself, by the names of the artifact's bindings.
            cache_hit: As the attribute.
            read_blob: Gets a blob's bytes, should the graph be saved.
            eager: Runs the graph itself, for calls that compiled pieces would get wrong.

        Raises:
            BindError: A held tensor does not fit.
            LinkError: A piece is missing.
        """
        self.artifact, self.graph_hash, self.cache_hit = artifact, artifact.graph_hash, cache_hit
        self._held, self._read_blob = held, read_blob
        function = link(artifact, pieces, bind_tensors(artifact.bindings, held, {}))
        self._call = _build_call(artifact, function, held, eager)

    def __call__(self, *args: Any) -> Any:
        """Run the graph.

        Args:
            *args: One value a placeholder.

        Returns:
            The graph's flat results.
        """
        return self._call(*args)

    def __repr__(self) -> str:
        return f"<CompiledGraph {self.artifact.label} {self.graph_hash[:12]} {self.cache_hit or 'compiled'}>"

    @classmethod
    def serialize_compile_artifacts(cls, fn: Any) -> bytes:
        """Write a compiled graph down, pieces and all; for ``torch.compile(...).aot_compile``.

        Args:
            fn: A compiled graph.

        Raises:
            BackendError: A piece is not in the cache any more.
        """
        if not isinstance(fn, CompiledGraph):
            raise BackendError(f"{fn!r} is no graph that stitchcache compiled.", backend="stitchcache")
        blobs = {blob.digest: fn._read_blob(blob) for blob in fn.artifact.blobs}
        return dump_graph(SavedGraph(fn.artifact, blobs, list(fn._held.buffers())))

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> CompiledGraph:
        """Read what :meth:`serialize_compile_artifacts` wrote. Needs no cache.

        Args:
            data: Bytes from somebody trusted: there is native code in them.

        Raises:
            EntryFormatError: They are something else, or damaged.
            BackendError: They were made for another machine or another torch.
        """
        saved = load_graph(data)
        return cls(
            saved.artifact,
            load_blobs(saved),
            held_tensors(saved.held),
            cache_hit="graph",
            read_blob=lambda blob: saved.blobs[blob.digest],
        )


def held_tensors(tensors: Any) -> torch.nn.Module:
    """Tensors that a graph holds itself, under the names that stitching code knows them by.

    Args:
        tensors: In the order of the capture.
    """
    root = torch.nn.Module()
    root.held = torch.nn.Module()
    for index, tensor in enumerate(tensors):
        root.held.register_buffer(str(index), tensor)
    return root


def _build_call(
    artifact: Artifact,
    function: Callable[..., Any],
    held: torch.nn.Module,
    eager: Callable[..., Any] | None,
) -> Callable[..., Any]:
    spec = artifact.input_spec
    if spec is None:
        raise EntryFormatError(
            f"entry {artifact.graph_hash[:12]} says nothing about inputs.",
            field="input_spec",
            reason="missing",
        )
    passed = [i for i, leaf in enumerate(spec.leaves) if leaf.kind != "constant"]
    tensors = [i for i, leaf in enumerate(spec.leaves) if leaf.tensor is not None]
    written = [i for i, leaf in enumerate(spec.leaves) if leaf.kind == "inout"]
    devices = [spec.leaves[i].tensor.device for i in tensors]  # type: ignore[union-attr]
    device = next((device for device in devices if device != "cpu"), "cpu")
    grad_enabled, autocast_enabled = torch.is_grad_enabled, torch.is_autocast_enabled
    every = len(passed) == len(spec.leaves)

    def call(*args: Any) -> Any:
        taken = args if every else tuple(args[i] for i in passed)
        if grad_enabled() or autocast_enabled(device):
            return run_quietly(function, device, taken)
        return function(*taken)

    if not written:
        return call
    more = list(held.buffers())

    def call_carefully(*args: Any) -> Any:
        """Compiled pieces take what they write to for memory of its own."""
        targets = [args[i] for i in written]
        # A write that autograd does not see would leave it with wrong gradients.
        unseen = grad_enabled() and any(target.requires_grad for target in targets)
        if not unseen and not share_memory(targets, [*(args[i] for i in tensors), *more]):
            return call(*args)
        if eager is not None:
            return eager(*args)
        what = "wants gradients" if unseen else "shares memory with another one"
        raise InputMismatchError(
            f"an argument that the model writes to {what}. "
            + ("Call it under torch.no_grad()." if unseen else "Pass a clone."),
            argument="",
            expected="an argument without gradients" if unseen else "memory of its own",
            actual=what,
        )

    return call_carefully
