"""Getting ready for a compilation while the model is still being built. Decides nothing.

What a preload did is used only where ``compile`` asks for the very same thing: an entry by the graph hash
that it found by itself, and a loaded piece by the digest of its bytes.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import threading
import time
from types import NoneType
from typing import TYPE_CHECKING, Any

from stitchcache.errors import StitchCacheError, check_kind

if TYPE_CHECKING:
    from stitchcache.api.prewarm import Target
    from stitchcache.cache import Cache
    from stitchcache.types import Artifact

log = logging.getLogger("stitchcache")

# Seconds that the thread has to end when the process exits.
_AT_EXIT = 10.0

Ready = dict[tuple[str, str], Any]
"""Loaded pieces, by backend and digest."""


class Preloaded:
    """A preload under way or done; give it to ``compile(..., preloaded=...)``.

    Args:
        wanted: Graph hash, prefix or label of an entry; ``None`` for no entry.
        cache: Where it lies.
    """

    def __init__(self, wanted: str | None, cache: Cache | None) -> None:
        self._cache = cache
        self._artifact: Artifact | None = None
        self._ready: Ready = {}
        self._process = os.getpid()
        self._found = threading.Event()
        self._missing = False
        self._thread = threading.Thread(
            target=self._run, args=(wanted,), name="stitchcache-preload", daemon=True
        )
        # The interpreter stops threads wherever they are. Inside of torch that may abort the process.
        atexit.register(self._thread.join, _AT_EXIT)
        self._thread.start()

    @property
    def cache(self) -> Cache | None:
        """The cache; ``None`` if the default one cannot be opened. Waits until that is known."""
        self._known()
        return self._cache

    def _known(self) -> bool:
        """Wait until the entry is known; False in a forked process, where the thread does not exist."""
        return os.getpid() == self._process and self._found.wait()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is done.

        Args:
            seconds: At most so long; ``None`` waits as long as it takes.

        Returns:
            Whether it is done; False also where there is no such entry.
        """
        if os.getpid() != self._process:
            return False
        self._thread.join(seconds)
        return not self._thread.is_alive() and not self._missing

    def artifact(self, graph_hash: str) -> Artifact | None:
        """The entry of a graph hash, read and verified; ``None`` where it is another one or none."""
        found = self._artifact if self._known() else None
        return found if found is not None and found.graph_hash == graph_hash else None

    def take(self, graph_hash: str) -> Ready:
        """Loaded CPU pieces of an entry; empty where another one was preloaded."""
        return self._ready if self.artifact(graph_hash) is not None and self.wait() else {}

    def _run(self, wanted: str | None) -> None:
        began, what = time.perf_counter(), "modules"
        try:
            try:
                artifact = self._find(wanted)
            finally:
                self._found.set()
                # Last, as it imports torch, which the caller may still be doing.
                importlib.import_module("stitchcache.api.compile")
            if artifact is not None:
                what = f"entry {artifact.graph_hash[:12]}"
                self._load(artifact)
            elif wanted is not None:
                self._missing = True
                where = self._cache.root if self._cache is not None else "the cache"
                said = "preload: no usable entry in %s has the label or graph hash %r (see stitchcache ls)"
                log.warning(said, where, wanted)
        except (StitchCacheError, OSError) as error:
            # compile() meets it too, and says what is to be said.
            log.debug("preload: %s", error)
        atexit.unregister(self._thread.join)
        log.debug("preload: %s in %.3f s", what, time.perf_counter() - began)

    def _find(self, wanted: str | None) -> Artifact | None:
        # Needs no torch.
        from stitchcache.cache import chosen_cache

        self._cache = chosen_cache(self._cache)
        graph_hash = self._cache.latest(wanted) if wanted is not None else None
        if graph_hash is not None:
            self._artifact = self._cache.get(graph_hash)
        return self._artifact

    def _load(self, artifact: Artifact) -> None:
        """Digest all blobs and load those that any process on the CPU loads alike."""
        from stitchcache.runtime.model import check_environment, devices_in
        from stitchcache.torchside import load_library

        if self._cache is None:
            return
        check_environment(artifact, f"entry {artifact.graph_hash[:12]}")
        # Pieces of other backends may need ops that the model's modules register.
        alike = {p.blob.digest for p in artifact.pieces if p.backend == "aoti"}
        on_cpu = devices_in(artifact) == {"cpu"}
        with self._cache.opened(artifact.blobs) as paths:
            for blob, path in zip(artifact.blobs, paths, strict=True):
                if path is None or not on_cpu or blob.digest not in alike:
                    continue
                self._ready["aoti", blob.digest] = load_library(path, "cpu")


def preload(target: Target | str | None = None, *, cache: Cache | None = None) -> Preloaded:
    """Start getting ready for ``compile``, in a thread, and return at once.

    The thread imports what a warm start imports and, where it is told which entry to expect, reads and
    verifies it and loads its pieces. Nothing is decided by that: ``compile`` computes its key and checks
    sources as always, and takes what is ready only if it comes to the same entry. A wrong guess costs some
    time of a thread, and no more.

    Call it before the model is built, best before the weights are read::

        preloaded = stitchcache.preload("minilm")
        model = build()
        compiled = stitchcache.compile(model, args, preloaded=preloaded)

    Args:
        target: Which entry to expect: a graph hash, a prefix of one, or a label as ``stitchcache ls`` shows
            it (a target's name where it was prewarmed, else the model's class); of several entries with a
            label the one used last. A ``Target`` means its name. ``None`` imports modules only.
        cache: Where it lies; the default cache if ``None``.

    Returns:
        What to give to ``compile``.

    Raises:
        OptionError: ``target`` is something else.
    """
    wanted: Any = getattr(target, "name", target)
    check_kind("target", wanted, (str, NoneType), "a Target, a label, or a graph hash")
    return Preloaded(wanted, cache)
