"""Compile the pieces that the cache lacks, and store what came of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stitchcache.api.estimate import Estimate, compiled_before
from stitchcache.api.request import Request
from stitchcache.api.trace import Traced, assemble, stitched_leaves
from stitchcache.artifact.consts import dump_consts
from stitchcache.artifact.record import Artifact
from stitchcache.cache import Cache
from stitchcache.errors import BackendError, EntryFormatError, StoreWriteError, UntrustedEntryError
from stitchcache.pieces import get_backend
from stitchcache.plan.build import BuiltPiece, at_once, build
from stitchcache.plan.plan import PlannedPiece
from stitchcache.types import BlobRef, Factor

log = logging.getLogger("stitchcache")


def compile_pieces(
    traced: Traced,
    request: Request,
    cache: Cache,
    *,
    device: str,
    devices: Sequence[str],
    factors: Sequence[Factor],
    label: str,
    tell: Callable[[str, int, int, float | None], None],
) -> tuple[Artifact, dict[str, Any], Mapping[str, torch.Tensor]]:
    """Compile, load and store.

    A store that cannot be written costs the storing, not the compiling.

    Args:
        traced: What was planned.
        request: Options.
        cache: Where to store.
        device: Where pieces run.
        devices: Device types in use.
        factors: Named parts of all keys.
        label: What to call the entry.
        tell: Gets the stage, pieces done, pieces in all, and seconds left where they can be told.

    Returns:
        The artifact, its loaded pieces, and its constants.

    Raises:
        BackendError: A piece cannot be compiled, or is wrong.
    """
    began = time.perf_counter()
    shelf = _Shelf(cache, label, device)
    distinct = {piece.key: piece for _, planned in traced.plans for piece in planned.pieces}
    missing = {key for key, piece in distinct.items() if not shelf.find(piece)}
    done = len(distinct) - len(missing)
    before = {piece.backend: compiled_before(cache, piece.backend) for piece in distinct.values()}
    estimate = Estimate(cache, request.backend, len(missing), at_once(len(missing), request.jobs))
    tell("compile", done, len(distinct), estimate.left())

    def on_built(built: BuiltPiece) -> None:
        nonlocal done
        done += 1
        estimate.took(built.backend, built.seconds)
        shelf.take(built)
        tell("compile", done, len(distinct), estimate.left() if done < len(distinct) else None)

    for planned, captured in traced.builds:
        pieces = {piece.key: piece for piece in planned.pieces if piece.key in missing - shelf.pieces.keys()}
        if not pieces:
            continue
        with cache.scratch() as scratch:
            build(
                planned,
                list(pieces.values()),
                stitched_leaves(captured) if request.verify else None,
                scratch,
                request.backend_options,
                jobs=request.jobs,
                devices=devices,
                before=before,
                on_built=on_built,
            )
    tell("store", done, len(distinct), None)
    constants = {name: shelf.keep(dump_consts([tensor]) or b"") for name, tensor in traced.constants.items()}
    artifact = assemble(
        traced,
        shelf.blobs,
        constants,
        factors=factors,
        label=label,
        seconds=time.perf_counter() - began,
    )
    shelf.put(artifact)
    # Copies, as every later process has them: a change to the model's own must not show in one only.
    return artifact, shelf.pieces, {name: tensor.clone() for name, tensor in traced.constants.items()}


class _Shelf:
    """Compiled pieces of one run: stored where possible, loaded in any case."""

    def __init__(self, cache: Cache, label: str, device: str) -> None:
        self._cache, self._label, self._device = cache, label, device
        self._stored = True
        self.blobs: dict[str, BlobRef] = {}
        self.pieces: dict[str, Any] = {}

    def find(self, piece: PlannedPiece) -> bool:
        """Take a piece that another model, or an interrupted run, has stored."""
        record = self._cache.get_piece(piece.key)
        if record is None or record.backend != piece.backend:
            return False
        try:
            path = self._cache.blob_path(record.blob)
        except UntrustedEntryError as error:
            log.warning("%s", error)
            return False
        if path is None:
            return False
        try:
            self.pieces[piece.key] = get_backend(record.backend).load(path, self._device)
        except (BackendError, EntryFormatError, OSError) as error:
            log.warning("%s: compiling again: %s", self._label, error)
            return False
        self.blobs[piece.key] = record.blob
        return True

    def take(self, built: BuiltPiece) -> None:
        """Load and store a fresh piece."""
        self.pieces[built.key] = get_backend(built.backend).load(built.path, self._device)
        blob = self.keep(built.path)
        self.blobs[built.key] = blob
        log.debug("piece %s: %s, %.1f s, %d bytes", built.key[:12], built.backend, built.seconds, blob.size)
        self._try(lambda: self._cache.put_piece(built.key, built.backend, blob))

    def keep(self, source: bytes | Path) -> BlobRef:
        """Store bytes, or at least name them."""
        stored: list[BlobRef] = []
        self._try(lambda: stored.append(self._cache.put_blob(source)))
        return stored[0] if stored else _name(source)

    def put(self, artifact: Artifact) -> None:
        """Store the entry, if its blobs are stored."""
        self._try(lambda: self._cache.put(artifact))

    def _try(self, write: Callable[[], Any]) -> None:
        if not self._stored:
            return
        try:
            write()
        except StoreWriteError as error:
            self._stored = False
            log.warning("%s: compiled, but not stored: %s", self._label, error)


def _name(source: bytes | Path) -> BlobRef:
    import hashlib

    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError:
        # Too many open files, say. Nothing of this run is stored any more, so nobody goes by the name.
        data = b""
    return BlobRef(digest=hashlib.sha256(data).hexdigest(), size=len(data))
