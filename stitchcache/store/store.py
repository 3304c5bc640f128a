"""The store as one object: everything about roots that needs no knowledge of what an entry says."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stitchcache.errors import OptionError, StoreError
from stitchcache.store.files import Files, words
from stitchcache.store.layers import Layers
from stitchcache.store.layout import Area, Roots, check_key, flag, max_size, root_paths
from stitchcache.store.root import Root
from stitchcache.store.stats import Counters
from stitchcache.types import BlobRef

if TYPE_CHECKING:
    from stitchcache.store.evict import PrunePlan, PruneResult
    from stitchcache.store.scan import Codec, Reading
    from stitchcache.store.stats import CacheStats
    from stitchcache.store.verify import VerifyReport

_WORTH_THREADS = 8 << 20
"""Bytes that take longer to digest, some six milliseconds, than threads take to start and take turns."""

log = logging.getLogger("stitchcache")


class Store:
    """Roots, their blobs, locks and upkeep.

    :class:`stitchcache.Cache` tells what the arguments are; it adds entries, targets, pieces and the format.
    """

    codec: Codec

    def __init__(
        self,
        root: Roots | None = None,
        *,
        read_only: bool = False,
        max_bytes: int | None = None,
        max_files: int | None = None,
        durability: Literal["full", "fast"] = "full",
        _files: Files | None = None,
    ) -> None:
        if durability not in ("full", "fast"):
            raise OptionError(f"durability={durability!r}: use 'full' or 'fast'", option="durability")
        self.read_only = read_only or flag("STITCHCACHE_READONLY")
        self.max_bytes = max_size() if max_bytes is None else max_bytes
        self.max_files = max_files
        self.durability = durability
        self._files = _files or Files()
        roots = [
            Root(
                path,
                files=self._files,
                durable=durability == "full",
                read_only=self.read_only or index > 0,
            )
            for index, path in enumerate(root_paths(root))
        ]
        self._top = roots[0]
        self._counters = Counters(self._top)
        self._layers = Layers(roots, self._counters.add)
        # What was counted since the last put would be lost with the object.
        weakref.finalize(self, self._counters.flush)

    @cached_property
    def _reading(self) -> Reading:
        from stitchcache.store.scan import Reading

        return Reading(self._top, self.codec, self._layers.roots[1:])

    def __repr__(self) -> str:
        return f"Cache({', '.join(str(root) for root in self.roots)!r})"

    @property
    def root(self) -> Path:
        """The first root directory, the one that is written."""
        return Path(self._top.path)

    @property
    def roots(self) -> tuple[Path, ...]:
        """All root directories, in the order they are searched."""
        return tuple(Path(root.path) for root in self._layers.roots)

    # -- blobs ---------------------------------------------------------------------------------------

    def put_blob(self, source: bytes | str | os.PathLike[str]) -> BlobRef:
        """Store bytes under their digest; they are kept until the artifact that names them is put.

        Args:
            source: The bytes, or the file that has them.

        Raises:
            StoreWriteError: The store cannot be written.
        """
        from stitchcache.store.publish import publish_blob

        what = source if isinstance(source, bytes) else os.fspath(source)
        digest, size = publish_blob(self._top, self._layers.holds, what)
        return BlobRef(digest=digest, size=size)

    def blob_path(self, ref: BlobRef) -> Path | None:
        """A blob's file, its size and digest checked.

        Returns:
            ``None`` where it is in no layer, or damaged (of which a warning told).

        Raises:
            UntrustedEntryError: It is there, but others can write it or a directory above it.
        """
        path = self._layers.blob_path(ref.digest, ref.size)
        return None if path is None else Path(path)

    def blob_paths(self, refs: Sequence[BlobRef]) -> list[Path | None]:
        """The same for several blobs; large ones are digested at one time, on several processors.

        Raises:
            UntrustedEntryError: Others can write one of them.
        """
        if len(refs) < 2 or sum(ref.size for ref in refs) < _WORTH_THREADS:
            return [self.blob_path(ref) for ref in refs]
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(min(len(refs), os.cpu_count() or 1, 8), "stitchcache-digest") as pool:
            return list(pool.map(self.blob_path, refs))

    # -- working together --------------------------------------------------------------------------

    @contextmanager
    def lock(
        self,
        key: str,
        *,
        timeout: float | None = None,
        on_wait: Callable[[float, str], None] | None = None,
    ) -> Iterator[bool]:
        """Let one process at a time work on a key.

        Args:
            key: 64 hex digits.
            timeout: Seconds to wait for another process; ``None`` waits as long as it takes.
            on_wait: Called now and then while waiting, with the seconds waited and who holds the lock.

        Yields:
            True when held; False where locks do not work (a read-only root, some network file systems): then
            the work may be done twice, and that is all.

        Raises:
            LockTimeoutError: Another process held it for all that time.
        """
        from stitchcache.store.locks import exclusive

        directory = self._top.area(Area.LOCKS)
        path = os.path.join(directory, f"{check_key(key)}.lock")
        try:
            usable = not self._top.read_only
            if usable:
                self._top.make_dir(directory)
        except OSError:
            usable = False
        if not usable:
            yield False
            return
        with exclusive(self._files, path, timeout=timeout, on_wait=on_wait) as held:
            yield held

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A private temporary directory, on the store's file system where that can be written."""
        from stitchcache.store.publish import scratch

        with scratch(self._top) as path:
            yield Path(path)

    def why_not_writable(self) -> str | None:
        """Why nothing can be stored; ``None`` when it can. Tries it."""
        from stitchcache.store.publish import why_not_writable

        return why_not_writable(self._top)

    # -- upkeep ------------------------------------------------------------------------------------

    def counted(self) -> dict[str, int]:
        """What was counted, this process's own included; looks at no entry."""
        return self._counters.read()[0]

    def count(self, event: str, amount: int = 1) -> None:
        """Add to a statistic, such as ``hit.direct`` or ``miss.no-entry``; written later, at no cost now."""
        self._counters.add(event, amount)

    def stats(self) -> CacheStats:
        """What the first root holds, and what was counted."""
        from stitchcache.store.scan import totals
        from stitchcache.store.stats import CacheStats

        counters, since = self._counters.read()
        try:
            sums = totals(self._top)
        except OSError as error:
            self._layers.warn(self._top.path, f"{self._top.path}: cannot be listed ({words(error)})")
            return CacheStats(counters=counters, since=since)
        held = [sums[area] for area in (Area.ENTRIES, Area.BLOBS, Area.TARGETS, Area.PIECES)]
        return CacheStats(
            counters=counters,
            since=since,
            entries=held[0][0],
            blobs=held[1][0],
            targets=held[2][0],
            pieces=held[3][0],
            files=sum(files for files, _ in held),
            bytes=sum(size for _, size in held),
            quarantine_files=sums[Area.QUARANTINE][0],
            quarantine_bytes=sums[Area.QUARANTINE][1],
        )

    def zero_stats(self) -> None:
        """Forget what was counted.

        Raises:
            StoreWriteError: The store cannot be written.
        """
        self._counters.zero()

    def plan_prune(
        self,
        *,
        max_bytes: int | None = None,
        max_files: int | None = None,
        max_age: float | None = None,
        min_free: int | None = None,
        grace_seconds: float | None = None,
    ) -> PrunePlan:
        """What a prune of the first root would remove; nothing goes until the plan's ``execute()``.

        Args:
            max_bytes: Bytes that may stay; default the cache's own limit.
            max_files: Files that may stay; default the cache's own limit.
            max_age: Seconds since its last use after which an entry goes.
            min_free: Bytes to be free on the file system.
            grace_seconds: How long a blob that no entry names is left alone; default an hour.

        Raises:
            StoreError: The root cannot be listed.
        """
        from stitchcache.store.evict import GRACE_SECONDS, Limits, plan_prune

        limits = Limits(
            max_bytes=self.max_bytes if max_bytes is None else max_bytes,
            max_files=self.max_files if max_files is None else max_files,
            max_age=max_age,
            min_free=min_free,
        )
        grace = GRACE_SECONDS if grace_seconds is None else grace_seconds
        try:
            return plan_prune(self._reading, limits, grace_seconds=grace)
        except OSError as error:
            raise self._unlistable(error) from error

    def _keep_within_limits(self) -> None:
        """After a put: evict where a limit is crossed. One process at a time, and never an error."""
        if self.max_bytes is None and self.max_files is None:
            return
        from stitchcache.store.evict import Limits, enforce

        try:
            result = enforce(self._reading, Limits(max_bytes=self.max_bytes, max_files=self.max_files))
        except OSError as error:
            log.warning("%s: the limits were not enforced: %s", self.root, error)
            return
        self._note_evicted(result)

    def _note_evicted(self, result: PruneResult) -> None:
        if result.entries:
            self._counters.add("evicted", len(result.entries))
            log.info(
                "%s: evicted %d entries, %d files, %d bytes",
                self.root,
                len(result.entries),
                result.files,
                result.bytes,
            )

    def verify(self, repair: bool = False) -> VerifyReport:
        """Read and check every file of the first root.

        Args:
            repair: Move what is damaged to quarantine, and remove pointers that lead nowhere.

        Raises:
            StoreError: The root cannot be listed.
        """
        from stitchcache.store.verify import verify

        try:
            return verify(self._reading, repair=repair)
        except OSError as error:
            raise self._unlistable(error) from error

    def clear(self) -> PruneResult:
        """Remove all entries, blobs, targets and pieces of the first root that are not in use.

        Raises:
            StoreError: The root cannot be listed or written.
        """
        return self.plan_prune(max_bytes=0, max_files=0, grace_seconds=0.0).execute()

    def _unlistable(self, error: OSError) -> StoreError:
        return StoreError(f"{self.root}: cannot be listed ({words(error)})", path=str(self.root))
