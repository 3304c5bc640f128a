"""One of the graphs that ``torch.compile`` captured: what is called in its place, and how it is saved.

A saved graph, for ``torch.compile(...).aot_compile(...).save_compiled_function``, is bytes that stand for
themselves: entry, pieces, and tensors that the graph holds. It is native code that its reader trusts, as
every file of that kind is.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack
import torch

from stitchcache.artifact.consts import dump_consts, load_consts
from stitchcache.artifact.entry import CURRENT_SUFFIX, decode_named, encode
from stitchcache.codegen import CodeObjects
from stitchcache.errors import BackendError, EntryDamagedError, EntryFormatError, InputMismatchError
from stitchcache.pieces import get_backend
from stitchcache.runtime import run_quietly
from stitchcache.runtime.contract import share_memory
from stitchcache.runtime.model import bind_tensors, check_environment, devices_in, link
from stitchcache.torchside.dynamo import SerializableCallable
from stitchcache.types import Artifact, BlobRef

_MAGIC = "stitchcache torch.compile graph 1"
_WHERE = "a function saved by torch.compile(...).aot_compile"


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
        function = link(artifact, pieces, bind_tensors(artifact.bindings, held, {}), CodeObjects())
        self._call = _build_call(artifact, function, list(held.buffers()), eager)

    def __call__(self, *args: Any) -> Any:
        """Run the graph: one value a placeholder to the graph's flat results."""
        return self._call(*args)

    def __repr__(self) -> str:
        return f"<CompiledGraph {self.artifact.label} {self.graph_hash[:12]} {self.cache_hit or 'compiled'}>"

    @classmethod
    def serialize_compile_artifacts(cls, fn: Any) -> bytes:
        """Write a compiled graph down, pieces and all; for ``torch.compile(...).aot_compile``.

        Raises:
            BackendError: ``fn`` is no compiled graph, or a piece is not in the cache any more.
            UnserializableConstError: A tensor cannot be stored.
        """
        if not isinstance(fn, CompiledGraph):
            raise BackendError(f"{fn!r} is no graph that stitchcache compiled.", backend="stitchcache")
        blobs = {blob.digest: fn._read_blob(blob) for blob in fn.artifact.blobs}
        return dump_graph(fn.artifact, blobs, list(fn._held.buffers()))

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> CompiledGraph:
        """Read what :meth:`serialize_compile_artifacts` wrote. Needs no cache.

        Args:
            data: Bytes from somebody trusted: there is native code in them.

        Raises:
            EntryFormatError: They are something else, or damaged.
            BackendError: They were made for another machine or another torch.
        """
        artifact, blobs, held = load_graph(data)
        pieces = load_blobs(artifact, blobs)
        tensors = held_tensors(held)
        return cls(artifact, pieces, tensors, cache_hit="graph", read_blob=lambda blob: blobs[blob.digest])


def held_tensors(tensors: Iterable[torch.Tensor]) -> torch.nn.Module:
    """Tensors that a graph holds itself, in the order of the capture, as stitching code knows them."""
    root = torch.nn.Module()
    root.held = torch.nn.Module()
    for index, tensor in enumerate(tensors):
        root.held.register_buffer(str(index), tensor)
    return root


def _build_call(
    artifact: Artifact,
    function: Callable[..., Any],
    held: Sequence[torch.Tensor],
    eager: Callable[..., Any] | None,
) -> Callable[..., Any]:
    leaves = artifact.input_spec.leaves if artifact.input_spec is not None else ()
    passed = [i for i, leaf in enumerate(leaves) if leaf.kind != "constant"]
    tensors = [i for i, leaf in enumerate(leaves) if leaf.tensor is not None]
    written = [i for i, leaf in enumerate(leaves) if leaf.kind == "inout"]
    device = _device_of(artifact)
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
        if not unseen and not share_memory(targets, [*(args[i] for i in tensors), *held]):
            return call(*args)
        if eager is not None:
            return eager(*args)
        what = "requires gradients" if unseen else "shares memory with another one"
        raise InputMismatchError(
            f"an argument that the model writes to {what}. "
            + ("Call it under torch.no_grad()." if unseen else "Pass a clone."),
            argument="",
            expected="an argument without gradients" if unseen else "memory of its own",
            actual=what,
        )

    return call_carefully if written else call


def dump_graph(artifact: Artifact, blobs: Mapping[str, bytes], held: Sequence[torch.Tensor]) -> bytes:
    """Write a graph down: its entry, each of its blobs by digest, and the tensors that it holds itself."""
    record = {
        "magic": _MAGIC,
        "graph_hash": artifact.graph_hash,
        "entry": encode(artifact),
        "blobs": dict(blobs),
        "held": dump_consts(list(held)),
    }
    return bytes(msgpack.packb(record))


def load_graph(data: bytes) -> tuple[Artifact, Mapping[str, bytes], Sequence[torch.Tensor]]:
    """Read what :func:`dump_graph` wrote.

    Raises:
        EntryFormatError: The bytes are something else.
        EntryDamagedError: The entry or a piece is not what it was.
        BackendError: They were made for another machine or another torch.
    """
    try:
        record = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException) as error:
        raise _malformed("", str(error)) from error
    if not isinstance(record, dict) or record.get("magic") != _MAGIC:
        raise _malformed("magic", f"not {_MAGIC!r}")
    kinds = {"graph_hash": str, "entry": bytes, "blobs": dict, "held": (bytes, type(None))}
    for field, kind in kinds.items():
        if not isinstance(record.get(field), kind):  # type: ignore[arg-type]
            raise _malformed(field, "missing, or of another type")
    artifact = decode_named(record["entry"], record["graph_hash"], _WHERE + CURRENT_SUFFIX)
    check_environment(artifact, _WHERE)
    for blob in artifact.blobs:
        found = record["blobs"].get(blob.digest)
        if not isinstance(found, bytes) or hashlib.sha256(found).hexdigest() != blob.digest:
            raise _malformed(f"blobs[{blob.digest[:12]}]", "missing or damaged", EntryDamagedError)
    return artifact, record["blobs"], load_consts(record["held"])


def load_blobs(artifact: Artifact, blobs: Mapping[str, bytes]) -> dict[str, Any]:
    """Load the pieces of a saved graph: piece key to callable.

    Raises:
        BackendError: A piece cannot be loaded here.
    """
    device = _device_of(artifact)
    pieces: dict[str, Any] = {}
    # A library that is mapped outlives its file.
    with tempfile.TemporaryDirectory(prefix="stitchcache-") as directory:
        for piece in {piece.key: piece for piece in artifact.pieces}.values():
            path = Path(directory, piece.blob.digest)
            path.write_bytes(blobs[piece.blob.digest])
            pieces[piece.key] = get_backend(piece.backend).load(path, device)
    return pieces


def _device_of(artifact: Artifact) -> str:
    return next((device for device in devices_in(artifact) if device != "cpu"), "cpu")


def _malformed(field: str, reason: str, kind: type[EntryFormatError] = EntryFormatError) -> EntryFormatError:
    where = f"{_WHERE}: {field}" if field else _WHERE
    return kind(f"{where}: {reason}. Compile and save it again.", field=field, reason=reason)
