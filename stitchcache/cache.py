"""The cache: artifacts, pieces and target keys over one or more root directories. Imports no torch.

Reading never writes but to note a use, and never raises for damage: that is a miss, one warning, and the file
goes to quarantine. Writing raises :class:`~stitchcache.errors.StoreWriteError` where the store cannot be
written, and the caller goes on without having stored anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from stitchcache.artifact.entry import EntryCodec, decode, decode_named, decode_piece, decode_target
from stitchcache.errors import (
    AmbiguousPrefixError,
    EntryFormatError,
    FutureFormatError,
    GraphHashError,
    StoreWriteError,
    UntrustedEntryError,
)
from stitchcache.store.files import close_quietly, words
from stitchcache.store.layout import (
    LEGACY_SUFFIXES,
    MAX_ENTRY,
    MAX_LEGACY,
    MAX_RECORD,
    Area,
    check_key,
    keyed_path,
)
from stitchcache.store.locks import hold_shared
from stitchcache.store.root import Root
from stitchcache.store.store import Store
from stitchcache.types import BlobRef, TargetRecord, is_digest

if TYPE_CHECKING:
    from stitchcache.artifact.entry import Header, PieceRecord
    from stitchcache.types import Artifact

T = TypeVar("T")

_LOOKED_AT = 256
"""Headers that a search for a label reads at most: some fifty microseconds each."""


class Cache(Store):
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

    codec = EntryCodec()

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
            StoreWriteError: The store cannot be written, a blob that the artifact names is in no layer, or a
                newer stitchcache's entry has the name.
            EntryFormatError: A value in it has no form in the format.
        """
        # What only writing needs is imported where it is done: a warm start does none.
        from stitchcache.artifact.entry import encode
        from stitchcache.store.publish import publish

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

    def latest(self, name: str) -> str | None:
        """Graph hash of the entry that a name means, most likely.

        Args:
            name: A graph hash, a prefix of one, or a label.

        Returns:
            Of several entries the one used last; ``None`` where there is none. Of a large cache only the
            entries used last are looked at.
        """
        if is_digest(name):
            return name
        used: list[tuple[float, str, str]] = []
        for _, key, path in self._layers.entry_paths():
            try:
                used.append((self._files.lstat(path).st_mtime, key, path))
            except OSError:
                continue
        used.sort(reverse=True)
        for _, key, path in used[:_LOOKED_AT]:
            try:
                header = self._header(path)
            except (EntryFormatError, OSError):
                continue
            if header is not None and header.label == name:
                return key
        return next((key for _, key, _ in used if key.startswith(name)), None)

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
        from stitchcache.artifact.entry import decode_header
        from stitchcache.store.scan import read_head

        head = read_head(self._files, path, self._reading.codec)
        return None if head is None else decode_header(*head, path=path)

    # -- blobs, pieces, targets --------------------------------------------------------------------

    def get_target(self, key: str) -> tuple[TargetRecord, ...]:
        """What a target key leads to: one record for each configuration of what the key does not cover.

        Two processes that differ only in a global or an environment variable that the model reads have one
        key and a record each.

        Returns:
            Newest first; none where nothing sound is known. The first one whose sources and globals are
            unchanged is the one that counts.
        """
        found = self._record(Area.TARGETS, key, lambda data, path: decode_target(data, key, path=path))
        return found or ()

    def put_target(self, key: str, record: TargetRecord) -> None:
        """Let a target key lead to an entry; the entry comes first.

        The record replaces the one with the same sources and globals, else it is added. Of more than eight
        records the oldest goes. Where two processes do this at once, the record of one may be lost: that
        costs a trace.

        Raises:
            StoreWriteError: The store cannot be written.
            EntryFormatError: A value in it has no form in the format.
        """
        from stitchcache.artifact.entry import MOST_RECORDS, encode_target, unpack_factors
        from stitchcache.store.publish import publish

        others = [
            known
            for known in self.get_target(key)
            if (known.sources, known.globals) != (record.sources, record.globals)
        ]
        data = encode_target(key, [record, *others][:MOST_RECORDS])
        decode_target(data, key)
        unpack_factors(record.factors)
        self._refuse_newer(keyed_path(self._top.path, Area.TARGETS, key), key)
        publish(self._top, Area.TARGETS, key, data)

    def _refuse_newer(self, path: str, key: str) -> None:
        """Leave a target of a newer stitchcache alone: it may serve several versions from one directory."""
        try:
            found = self._top.read(path, MAX_RECORD)
            if found is not None:
                decode_target(found.data, key, path=path)
        except FutureFormatError as error:
            raise StoreWriteError(error.message, path=path, reason=error.reason) from error
        except (EntryFormatError, OSError):
            # Damaged, or not to be read: what is written takes its place.
            return

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
        from stitchcache.artifact.entry import PieceRecord, encode_piece
        from stitchcache.store.publish import publish

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

    def migrate(self) -> list[str]:
        """Rewrite the first root's legacy entries in the current format; each old file goes only after.

        Returns:
            Graph hashes of the entries that were rewritten. One that cannot be read is left, and warned of.

        Raises:
            StoreWriteError: The store cannot be written.
            StoreError: The root cannot be listed.
        """
        from stitchcache.store.scan import legacy_items
        from stitchcache.types import ENTRY_VERSION

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
                    self.put(replace(old, format_version=ENTRY_VERSION))
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


def _entry_files(root: Root, graph_hash: str) -> Iterator[tuple[str, int]]:
    yield keyed_path(root.path, Area.ENTRIES, graph_hash), MAX_ENTRY
    for suffix in LEGACY_SUFFIXES:
        yield os.path.join(root.path, graph_hash + suffix), MAX_LEGACY


def _missing(root: str, blob: BlobRef) -> StoreWriteError:
    path = keyed_path(root, Area.BLOBS, blob.digest)
    return StoreWriteError(
        f"{path}: the artifact names this blob of {blob.size} bytes, and it is not stored: put_blob() comes "
        "before put()",
        path=path,
        reason="a blob is missing",
    )
