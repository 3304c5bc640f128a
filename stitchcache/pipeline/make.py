"""``make``: from a planned entry to an artifact, compiling the pieces that the cache lacks."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from stitchcache.artifact.consts import dump_consts
from stitchcache.cache import Cache
from stitchcache.errors import BackendError, EntryFormatError, StoreWriteError, UntrustedEntryError
from stitchcache.graph.symbols import without_guards
from stitchcache.pieces import get_backend
from stitchcache.pieces.build import BuiltPiece, at_once, build
from stitchcache.pipeline.entry import EntryPlan, assemble, stitched_leaves
from stitchcache.pipeline.request import Request, Site
from stitchcache.pipeline.start import Loaded
from stitchcache.plan.plan import PlannedPiece, examples_for
from stitchcache.types import Artifact, BlobRef, Factor

log = logging.getLogger("stitchcache")

_PIECES, _MICROSECONDS = "piece.compiled", "microseconds.piece"


@dataclass(frozen=True, slots=True)
class Made:
    """A new artifact.

    Args:
        artifact: What was compiled.
        loaded: Its pieces and constants, ready to be linked.
        store: Stores the entry, once it was looked at; one that cannot be stored is a warning.
    """

    artifact: Artifact
    loaded: Loaded
    store: Callable[[Artifact], None]


def make(planned: EntryPlan, request: Request, site: Site, known: Sequence[Factor]) -> Made:
    """Compile, load, and store the pieces.

    A store that cannot be written costs the storing, not the compiling.

    Args:
        planned: What was planned.
        request: Options.
        site: Where to store, and what to call the entry.
        known: Further factors of the source, which the entry keeps.

    Raises:
        BackendError: A piece cannot be compiled, or is wrong.
        CodegenError: The stitching graph has no form as source.
    """
    began = time.perf_counter()
    cache, tell = site.cache, site.clock.tell
    shelf = _Shelf(cache, site.label, site.device)
    distinct = {piece.key: piece for _, one in planned.plans for piece in one.pieces}
    missing = {key for key, piece in distinct.items() if not shelf.find(piece)}
    done = len(distinct) - len(missing)
    estimate = Estimate(cache, request.backend, len(missing), at_once(len(missing), request.jobs))
    tell("compile", done, len(distinct), estimate.left())

    def on_built(built: BuiltPiece) -> None:
        nonlocal done
        done += 1
        estimate.took(built.backend, built.seconds)
        shelf.take(built)
        tell("compile", done, len(distinct), estimate.left() if done < len(distinct) else None)

    for one, captured in planned.builds:
        pieces = {piece.key: piece for piece in one.pieces if piece.key in missing - shelf.pieces.keys()}
        if not pieces:
            continue
        # A process that only loads makes no assumptions about sizes, so compiling must add none.
        with cache.scratch() as scratch, without_guards(captured.gm.graph):
            wanted = list(pieces.values())
            build(
                wanted,
                examples_for(one, wanted, stitched_leaves(captured)) if request.verify else None,
                scratch,
                request.backend_options,
                jobs=request.jobs,
                devices=site.devices,
                on_built=on_built,
            )
    tell("store", done, len(distinct))
    constants = {name: shelf.keep(dump_consts([tensor]) or b"") for name, tensor in planned.constants.items()}
    seconds = time.perf_counter() - began
    artifact = assemble(planned, shelf.blobs, constants, known=known, label=site.label, seconds=seconds)
    # Copies, as every later process has them: a change to the model's own must not show in one only.
    copies = {name: tensor.clone() for name, tensor in planned.constants.items()}
    return Made(artifact, Loaded(shelf.pieces, copies), shelf.put)


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
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError:
        # Too many open files, say. Nothing of this run is stored any more, so nobody goes by the name.
        data = b""
    return BlobRef(digest=hashlib.sha256(data).hexdigest(), size=len(data))


class Estimate:
    """Seconds left of a run of equally likely pieces.

    Args:
        cache: Whose statistics speak until the first piece of this run is done; gets what this one takes.
        backend: Only pieces of the same backend compare.
        pieces: How many will be compiled.
        at_once: How many at a time.
    """

    def __init__(self, cache: Cache, backend: str, pieces: int, at_once: int) -> None:
        self._cache, self._backend = cache, backend
        self._rounds = -(-pieces // max(1, at_once))
        self._began = time.perf_counter()
        self._seen: list[float] = []
        self._before = _mean(cache.counted(), backend) if pieces else None

    def took(self, backend: str, seconds: float) -> None:
        """Learn from a finished piece.

        Args:
            backend: What compiled it.
            seconds: From the start of its process to its checked file.
        """
        self._cache.count(f"{_PIECES}.{backend}")
        self._cache.count(f"{_MICROSECONDS}.{backend}", int(seconds * 1e6))
        if backend == self._backend:
            self._seen.append(seconds)

    def left(self) -> float | None:
        """Seconds to go; ``None`` where nothing like it was ever timed, or it takes longer than that."""
        one = fmean(self._seen) if self._seen else self._before
        if one is None:
            return None
        left = self._rounds * one - (time.perf_counter() - self._began)
        return left if left > 0 else None


def _mean(counters: Mapping[str, int], backend: str) -> float | None:
    pieces = counters.get(f"{_PIECES}.{backend}", 0)
    return counters.get(f"{_MICROSECONDS}.{backend}", 0) / 1e6 / pieces if pieces > 0 else None
