"""How long compiling will still take, from what pieces took: in this run, or before on this store."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import fmean

from stitchcache.cache import Cache

_PIECES, _MICROSECONDS = "piece.compiled", "microseconds.piece"


def compiled_before(cache: Cache, backend: str) -> int:
    """How many pieces a backend has compiled on a store, as far as its statistics know."""
    return cache.counted().get(f"{_PIECES}.{backend}", 0)


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
