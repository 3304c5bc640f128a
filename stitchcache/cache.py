"""The cache: artifacts, pieces and target keys over one or more root directories. Imports no torch.

Reading never writes but to note a use, and never raises for damage: that is a miss, one warning, and the file
goes to quarantine. Writing raises :class:`~stitchcache.errors.StoreWriteError` where the store cannot be
written, and the caller goes on without having stored anything.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from stitchcache.artifact.codec import EntryCodec, decode_named, read_head
from stitchcache.artifact.decode import Header, decode, decode_piece, decode_target
from stitchcache.artifact.encode import encode, encode_piece, encode_target
from stitchcache.artifact.frame import FORMAT_VERSION
from stitchcache.artifact.record import Artifact, PieceRecord
from stitchcache.errors import (
    AmbiguousPrefixError,
    EntryFormatError,
    FutureFormatError,
    GraphHashError,
    OptionError,
    StoreError,
    StoreWriteError,
    UntrustedEntryError,
)
from stitchcache.store.failures import words
from stitchcache.store.files import Files, close_quietly
from stitchcache.store.layers import Layers
from stitchcache.store.layout import LEGACY_SUFFIXES, Area, check_key, keyed_path
from stitchcache.store.locks import exclusive, hold_shared
from stitchcache.store.publish import publish, publish_blob
from stitchcache.store.reading import MAX_ENTRY, MAX_LEGACY, MAX_RECORD, Reading
from stitchcache.store.reading import read_head as read_head_bytes
from stitchcache.store.root import Root
from stitchcache.store.scratch import scratch, why_not_writable
from stitchcache.store.settings import Roots, flag, max_size, root_paths
from stitchcache.store.stats import CacheStats, Counters
from stitchcache.types import BlobRef, TargetRecord

if TYPE_CHECKING:
    from stitchcache.store.evict import PrunePlan, PruneResult
    from stitchcache.store.verify import VerifyReport

T = TypeVar("T")

log = logging.getLogger("stitchcache")


class Cache:
    """Compiled models on disk, shared by processes.

    Constructing does no more than look whether the root is a directory; directories are made by the first
    write. One object may be used by several threads.

    Args:
        root: Directory, or several: the first is written, all are searched in order. ``None`` takes
            ``STITCHCACHE_DIR``, or else the user's cache directory.
        read_only: Write nothing; also set by ``STITCHCACHE_READONLY``.
        max_bytes: Evict down to this after a put; default ``STITCHCACHE_MAX_SIZE``, or no limit.
        max_files: Likewise for the number of files.
        durability: ``"full"`` makes an acknowledged put survive a power loss; ``"fast"`` leaves that to the
            system (what was torn is noticed by its digest, and is a miss).

    Raises:
        StoreError: A root is something other than a directory.
        OptionError: An environment variable makes no sense.
    """

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
        self._reading = Reading(self._top, EntryCodec(), roots[1:])
        # What was counted since the last put would be lost with the object.
        weakref.finalize(self, self._counters.flush)

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

    # -- entries ---------------------------------------------------------------------------------

    def get(self, graph_hash: str) -> Artifact | None:
        """The artifact of a graph hash.

        Args:
            graph_hash: 64 hex digits.

        Returns:
            ``None`` is a miss: there is no entry, or only a damaged one or one of a newer format (of which a
            warning told).

        Raises:
            UntrustedEntryError: There is an entry, but others can write it.
        """
        check_key(graph_hash)
        return self._layers.first(
            lambda root: _entry_files(root, graph_hash),
            lambda data, path: decode_named(data, graph_hash, path),
        )

    def put(self, artifact: Artifact) -> str:
        """Store an artifact whose blobs are stored.

        Returns:
            Its graph hash. When this returns, the entry survives a crash.

        Raises:
            StoreError: A blob that it names is in no layer.
            StoreWriteError: The store cannot be written, or a newer stitchcache's entry has the name.
            EntryFormatError: A value in it has no form in the format.
        """
        key = check_key(artifact.graph_hash)
        data = encode(artifact)
        # What is written can be read: a mistyped field is the writer's error, not the next process's.
        decode(data)
        path = keyed_path(self._top.path, Area.ENTRIES, key)
        with self._top.writing(path):
            for blob in artifact.blobs:
                if not self._layers.hold(blob.digest, blob.size):
                    raise _missing(self._top.path, blob)
            replaced: tuple[BlobRef, ...] | None = self._replaced(path, data)
            if replaced is not None:
                publish(self._top, Area.ENTRIES, key, data)
            # Eviction that looked before this entry existed sees by the new times that it must look again.
            for blob in artifact.blobs:
                self._top.touch(keyed_path(self._top.path, Area.BLOBS, blob.digest))
            # What only the replaced entry named needs no grace period: it was not put by a worker just now.
            for blob in set(replaced or ()).difference(artifact.blobs):
                self._top.touch(keyed_path(self._top.path, Area.BLOBS, blob.digest), long_ago=True)
        self._layers.holds.release(blob.digest for blob in artifact.blobs)
        self._counters.add("put")
        self._counters.add("put.bytes", len(data) + sum(blob.size for blob in artifact.blobs))
        self._keep_within_limits()
        self._counters.flush()
        return key

    def _replaced(self, path: str, data: bytes) -> tuple[BlobRef, ...] | None:
        """Blobs of the entry that a put will replace; ``None`` where it is there already.

        Raises:
            StoreWriteError: A newer stitchcache's entry has the name.
        """
        try:
            found = self._top.read(path, MAX_ENTRY)
            if found is None:
                return ()
            old = decode(found.data, path=path)
        except FutureFormatError as error:
            raise StoreWriteError(error.message, path=path, reason=error.reason) from error
        except EntryFormatError:
            return ()
        if found.data != data:
            return old.blobs
        self._top.touch(path)
        # Its writer may not have come to this.
        fd = self._files.open_read(path)
        try:
            self._top.sync(fd)
        finally:
            close_quietly(self._files, fd)
        self._top.sync_dir(os.path.dirname(path))
        return None

    @contextmanager
    def hold(self, artifact: Artifact) -> Iterator[bool]:
        """Keep an artifact's files from being evicted, by any process, for the length of the block.

        On local file systems a loaded library outlives its file; so there, holding matters between
        :meth:`get` and loading. On network file systems it matters for as long as the library is used.

        Yields:
            Whether all its blobs are there. Where locks do not work, that is all that is known.
        """
        held: list[int] = []
        try:
            complete = True
            try:
                entry = hold_shared(
                    self._files, keyed_path(self._top.path, Area.ENTRIES, artifact.graph_hash)
                )
                held += [] if entry is None else [entry]
                for blob in artifact.blobs:
                    fd = hold_shared(self._files, keyed_path(self._top.path, Area.BLOBS, blob.digest))
                    if fd is not None:
                        held.append(fd)
                    elif not self._reading.blob_beneath(blob.digest, blob.size):
                        complete = False
            except OSError:
                complete = False
            yield complete
        finally:
            for fd in held:
                close_quietly(self._files, fd)

    def find(self, prefix: str) -> str:
        """The full graph hash that a prefix means.

        Raises:
            GraphHashError: It names no entry, or is no hex.
            AmbiguousPrefixError: It names more than one.
        """
        wanted = prefix.lower()
        if not wanted or len(wanted) > 64 or not set(wanted) <= set("0123456789abcdef"):
            raise GraphHashError(f"{prefix!r} is no graph hash: 1 to 64 hex digits", prefix=prefix)
        found = sorted({key for _, key, _ in self._layers.entry_paths(wanted)})
        if not found:
            raise GraphHashError(f"no entry in {self.root} begins with {prefix}", prefix=prefix)
        if len(found) > 1:
            shown = ", ".join(key[: len(wanted) + 8] for key in found[:5])
            raise AmbiguousPrefixError(
                f"{prefix} means any of {len(found)} entries: {shown}", prefix=prefix, candidates=found
            )
        return found[0]

    def entries(self) -> list[Header]:
        """Headers of all entries that can be read, older formats included, by layer.

        A damaged one is left out, with one warning; :meth:`verify` reports them.
        """
        headers: dict[str, Header] = {}
        for _, key, path in self._layers.entry_paths():
            try:
                header = self._header(path)
            except EntryFormatError as error:
                self._layers.warn(path, error.message)
            except OSError as error:
                self._layers.warn(path, f"{path}: cannot be read ({words(error)})")
            else:
                if header is not None:
                    headers.setdefault(key, header)
        return list(headers.values())

    def _header(self, path: str) -> Header | None:
        head = read_head_bytes(self._files, path, self._reading.codec)
        return None if head is None else read_head(*head, path)

    # -- blobs, pieces, targets --------------------------------------------------------------------

    def put_blob(self, source: bytes | str | os.PathLike[str]) -> BlobRef:
        """Store bytes under their digest; they are kept until the artifact that names them is put.

        Args:
            source: The bytes, or the file that has them.

        Raises:
            StoreWriteError: The store cannot be written.
        """
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

    def get_target(self, key: str) -> TargetRecord | None:
        """What a target key leads to; ``None`` where nothing sound is known."""
        return self._record(Area.TARGETS, key, lambda data, path: decode_target(data, key, path=path))

    def put_target(self, key: str, record: TargetRecord) -> None:
        """Let a target key lead to an entry; the entry comes first.

        Raises:
            StoreWriteError: The store cannot be written.
        """
        data = encode_target(check_key(key), record)
        decode_target(data, key)
        publish(self._top, Area.TARGETS, key, data)

    def get_piece(self, key: str) -> PieceRecord | None:
        """The compiled piece of a piece key; ``None`` where there is none or its blob is gone.

        The blob is kept until the artifact that names it is put.
        """
        record = self._record(Area.PIECES, key, lambda data, path: decode_piece(data, key, path=path))
        try:
            if record is not None and self._layers.hold(record.blob.digest, record.blob.size):
                self._counters.add("hit.piece")
                return record
        except OSError as error:
            self._layers.warn(key, f"blob {key} of a piece cannot be read ({words(error)}): taken as missing")
        return None

    def put_piece(self, key: str, backend: str, blob: BlobRef) -> None:
        """Note that a piece key's compiled piece is this blob; the blob comes first.

        Raises:
            StoreWriteError: The store cannot be written.
        """
        data = encode_piece(PieceRecord(key=check_key(key), backend=backend, blob=blob))
        decode_piece(data, key)
        publish(self._top, Area.PIECES, key, data)

    def _record(self, area: Area, key: str, read: Callable[[bytes, str], T]) -> T | None:
        check_key(key)
        try:
            return self._layers.first(lambda root: [(keyed_path(root.path, area, key), MAX_RECORD)], read)
        except UntrustedEntryError as error:
            self._layers.warn(error.path, f"{error.message} (taken as missing)")
            return None

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
        with scratch(self._top) as path:
            yield Path(path)

    def why_not_writable(self) -> str | None:
        """Why nothing can be stored; ``None`` when it can. Tries it."""
        return why_not_writable(self._top)

    def writable(self) -> bool:
        """Whether something can be stored; :meth:`why_not_writable` says why not."""
        return self.why_not_writable() is None

    # -- upkeep ------------------------------------------------------------------------------------

    def count(self, event: str, amount: int = 1) -> None:
        """Add to a statistic, such as ``hit.direct`` or ``miss.no-entry``; written later, at no cost now."""
        self._counters.add(event, amount)

    def stats(self) -> CacheStats:
        """What the first root holds, and what was counted."""
        from stitchcache.store.scan import totals

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

    def migrate(self) -> list[str]:
        """Rewrite the first root's legacy entries in the current format; each old file goes only after.

        Returns:
            Graph hashes of the entries that were rewritten. One that cannot be read is left, and warned of.

        Raises:
            StoreWriteError: The store cannot be written.
            StoreError: The root cannot be listed.
        """
        from stitchcache.store.scan import legacy_items

        try:
            items = list(legacy_items(self._top))
        except OSError as error:
            raise self._unlistable(error) from error
        done = []
        for item in items:
            try:
                found = self._top.read(item.path, MAX_LEGACY)
                if found is None:
                    continue
                old = decode_named(found.data, item.key, item.path)
            except EntryFormatError as error:
                self._layers.warn(item.path, f"{error.message}; it is left where it is")
                continue
            except OSError as error:
                self._layers.warn(item.path, f"{item.path}: cannot be read ({words(error)}); it is left")
                continue
            with self._top.writing(item.path):
                # An entry that was compiled since has more to it.
                if not self._has_current(item.key):
                    self.put(replace(old, format_version=FORMAT_VERSION))
                self._files.unlink(item.path)
            done.append(item.key)
        return done

    def _has_current(self, key: str) -> bool:
        path = keyed_path(self._top.path, Area.ENTRIES, key)
        found = self._top.read(path, MAX_ENTRY)
        if found is None:
            return False
        try:
            decode_named(found.data, key, path)
        except EntryFormatError:
            return False
        return True

    def clear(self) -> PruneResult:
        """Remove all entries, blobs, targets and pieces of the first root that are not in use.

        Raises:
            StoreError: The root cannot be listed or written.
        """
        return self.plan_prune(max_bytes=0, max_files=0, grace_seconds=0.0).execute()

    def _unlistable(self, error: OSError) -> StoreError:
        return StoreError(f"{self.root}: cannot be listed ({words(error)})", path=str(self.root))


def _entry_files(root: Root, graph_hash: str) -> Iterator[tuple[str, int]]:
    yield keyed_path(root.path, Area.ENTRIES, graph_hash), MAX_ENTRY
    for suffix in LEGACY_SUFFIXES:
        yield os.path.join(root.path, graph_hash + suffix), MAX_LEGACY


def _missing(root: str, blob: BlobRef) -> StoreError:
    path = keyed_path(root, Area.BLOBS, blob.digest)
    return StoreError(
        f"{path}: the artifact names this blob of {blob.size} bytes, and it is not stored: put_blob() comes "
        "before put()",
        path=path,
    )
