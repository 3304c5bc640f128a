"""The cache: artifacts, pieces and target keys over one or more root directories. Imports no torch.

Reading never writes but to note a use, and never raises for damage: that is a miss, one warning, and the file
goes to quarantine. Writing raises :class:`~stitchcache.errors.StoreWriteError` where the store cannot be
written, and the caller goes on without having stored anything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar

from stitchcache import collection_paused, errors
from stitchcache.artifact import entry
from stitchcache.store import LEGACY_SUFFIXES, Area, check_key, keyed_path, words
from stitchcache.store.root import Root
from stitchcache.store.store import Store, log, needs_signature
from stitchcache.types import BlobRef, TargetRecord, is_digest

if TYPE_CHECKING:
    from stitchcache.store.evict import PrunePlan, PruneResult
    from stitchcache.store.upkeep import CacheStats, VerifyReport
    from stitchcache.types import Artifact

T = TypeVar("T")

# Headers that a search for a label reads at most: some fifty microseconds each.
_LOOKED_AT = 256


class Cache(Store):
    """Compiled models on disk, shared by processes.

    Constructing does no more than look whether the root is a directory; directories are made by the first
    write. One object may be used by several threads.

    Args:
        root: Directory, or several: the first is written, all are searched in order. ``None`` takes those
            of ``STITCHCACHE_DIR`` (``upper:lower``), or else the user's cache directory.
        read_only: Write nothing; also set by ``STITCHCACHE_READONLY``.
        max_bytes: Evict down to this after a put; default ``STITCHCACHE_MAX_SIZE``, or no limit.
        max_files: Likewise for the number of files.
        remote: URL of a store behind the roots, such as ``s3://bucket/prefix``: what no root has is fetched
            from there, and what is compiled is uploaded. Default ``STITCHCACHE_REMOTE``; ``""`` is none.
        trust: Who vouches for files, for all roots or for each: ``"owner"``, if nobody but the user or root
            can write them; ``"signed"``, if a key that the user trusts has signed them; ``"any"``, nobody
            has to. Default ``STITCHCACHE_TRUST``, or ``"owner"``. What was imported needs a signature under
            ``"owner"`` too.
        durability: ``"full"``: an acknowledged put survives a power loss; ``"fast"``: the system decides.

    Raises:
        StoreError: A root is something other than a directory.
        OptionError: An environment variable makes no sense.
    """

    def _send(self, area: Area, key: str, data: bytes, *blobs: BlobRef) -> None:
        """Upload what was stored now; what came from outside is not this cache's to give."""
        if self.remote and not entry.signature_in(data).startswith(entry.OUTSIDE):
            size = sum(blob.size for blob in blobs)
            self.tier.give(key, size, partial(self.tier.send, self, area, key, data, blobs))

    # -- entries ---------------------------------------------------------------------------------

    def get(self, graph_hash: str) -> Artifact | None:
        """The artifact of a graph hash; ``None``, a miss, where there is no entry, or a damaged or newer one.

        Raises:
            UntrustedEntryError: There is an entry, but others can write it, or its signature is not good.
        """
        return self._first(Area.ENTRIES, graph_hash, entry.decode_named)

    def put(self, artifact: Artifact, *, signature: bytes | None = None) -> str:
        """Store an artifact whose blobs are stored; its graph hash. After this the entry survives a crash.

        Args:
            artifact: What to store.
            signature: One that was made before; default our own, where a key is configured.

        Raises:
            StoreWriteError: The store cannot be written, lacks a blob, or has a newer stitchcache's entry.
            EntryFormatError: A value in it has no form in the format.
        """
        from stitchcache.store.upkeep import standing

        key, blobs = check_key(artifact.graph_hash), artifact.blobs
        data = self._signed(entry.Kind.ENTRY, key, entry.encode(artifact), signature)
        # What is written can be read: a mistyped field is the writer's error, not the next process's.
        entry.decode(data)
        path = keyed_path(self._top.path, Area.ENTRIES, key)
        places = {blob: keyed_path(self._top.path, Area.BLOBS, blob.digest) for blob in blobs}
        with self._top.writing(path):
            for blob, place in places.items():
                if not self._hold(blob):
                    message = (
                        f"{place}: the artifact names this blob of {blob.size} bytes, and it is not stored: "
                        "put_blob() comes before put()"
                    )
                    raise errors.StoreWriteError(message, path=place, reason="a blob is missing")
            replaced = standing(self._top, Area.ENTRIES, key, entry.decode_named)
            self._top.publish(path, data)
            # Eviction that looked before this entry existed sees by the new times that it must look again.
            for place in places.values():
                self._top.touch(place)
            # What only the replaced entry named needs no grace period: it was not put by a worker just now.
            for blob in set(replaced.blobs if replaced else ()).difference(blobs):
                self._top.touch(keyed_path(self._top.path, Area.BLOBS, blob.digest), 0)
        self.release(blobs)
        self.count("put")
        self.count("put.bytes", len(data) + sum(blob.size for blob in blobs))
        self._keep_within_limits()
        self._counters.flush()
        self._send(Area.ENTRIES, key, data, *blobs)
        return key

    def _signed(self, kind: entry.Kind, key: str, data: bytes, signature: bytes | None = None) -> bytes:
        if signature is None:
            signature = self._signature(kind.name.lower(), key, data[-entry.DIGEST_SIZE :].hex())
        return entry.with_signature(data, kind, signature) if signature else data

    @contextmanager
    def kept(self, artifact: Artifact) -> Iterator[None]:
        """Keep an artifact's blobs from being evicted for a block; what is opened needs no such thing."""
        for blob in artifact.blobs:
            self._hold(blob)
        try:
            yield
        finally:
            self.release(artifact.blobs)

    def release(self, blobs: Iterable[BlobRef]) -> None:
        """Let blobs that this process keeps be evicted where nothing names them."""
        self._top.release(blob.digest for blob in blobs)

    def find(self, prefix: str) -> str:
        """The full graph hash that a prefix means.

        Raises:
            GraphHashError: It names no entry, or is no hex.
            AmbiguousPrefixError: It names more than one.
        """
        wanted = str(prefix).lower()
        if not wanted or len(wanted) > 64 or not set(wanted) <= set("0123456789abcdef"):
            raise errors.GraphHashError(f"{prefix!r} is no graph hash: 1 to 64 hex digits", prefix=prefix)
        found = sorted({key for _, key in self._entries(Root.names, wanted)})
        if not found:
            raise errors.GraphHashError(f"no entry in {self.root} begins with {prefix}", prefix=prefix)
        if len(found) > 1:
            shown = ", ".join(key[: len(wanted) + 8] for key in found[:5])
            raise errors.AmbiguousPrefixError(
                f"{prefix} means any of {len(found)} entries: {shown}", prefix=prefix, candidates=found
            )
        return found[0]

    def latest(self, name: str) -> str | None:
        """Graph hash of the entry that a graph hash, a prefix of one, or a label means, most likely.

        Of several it is the one used last. Of a large cache only those used last are looked at.
        """
        if is_digest(name):
            return name
        used = sorted(self._entries(Root.items), key=lambda item: item.modified, reverse=True)
        for key, header in self._headers((item.path, item.key) for item in used[:_LOOKED_AT]):
            if header.label == name:
                return key
        return next((item.key for item in used if item.key.startswith(str(name))), None)

    def entries(self) -> list[entry.Header]:
        """Headers of all entries that can be read, older formats included, by layer.

        A damaged one is left out, with one warning; :meth:`verify` reports them.
        """
        headers: dict[str, entry.Header] = {}
        # Thousands are made, and all of them stay.
        with collection_paused():
            # Not as ``items``: what opens a file learns its size anyway.
            for key, header in self._headers(self._entries(Root.names)):
                headers.setdefault(key, header)
        return list(headers.values())

    def _entries(self, listed: Callable[[Root, Area, str], Iterable[T]], prefix: str = "") -> Iterator[T]:
        """Entries of all layers; a layer that cannot be listed has none, and is warned of."""
        for root in self._roots:
            try:
                yield from listed(root, Area.ENTRIES, prefix)
            except OSError as error:
                self.warn(root.path, f"{root.path}: cannot be listed ({words(error)})")

    def _headers(self, files: Iterable[tuple[str, str]]) -> Iterator[tuple[str, entry.Header]]:
        """Keys and headers of some files, given as path and key."""
        from stitchcache.store.upkeep import read_header

        for path, key in files:
            try:
                header = read_header(self._top, path)
            except (errors.EntryFormatError, OSError) as error:
                self.warn(path, f"{path}: cannot be read ({error})")
                continue
            if header is not None:
                yield key, header

    # -- pieces, targets ---------------------------------------------------------------------------

    def get_target(self, key: str) -> tuple[TargetRecord, ...]:
        """What a target key leads to, newest first: the first record whose sources and globals hold counts.

        Two processes that differ only in a global or an environment variable that the model reads have one
        key and a record each.
        """
        return tuple(record for record, _ in self.signed_records(key))

    def signed_records(self, key: str) -> entry.SignedRecords:
        """The same records with their signatures."""

        def vouched(root: Root, path: str, found: entry.SignedRecords) -> entry.SignedRecords | None:
            good = []
            for each in found:
                try:
                    self._vouch(root, path, key, *each)
                    good.append(each)
                except errors.UntrustedEntryError as error:
                    self.warn(path, f"{error.message} (taken as missing)")
            if root.trust == "signed" and root is not self._top:
                # Copied to the top layer, it is from outside.
                good = [(record, entry.OUTSIDE + its.removeprefix(entry.OUTSIDE)) for record, its in good]
            return tuple(good) or None

        return self.record(Area.TARGETS, key, entry.decode_signed, vouched) or ()

    def _vouch(
        self, root: Root, path: str, key: str, record: TargetRecord, its: bytes, trust: str | None = None
    ) -> None:
        """Raise ``UntrustedEntryError`` for a record that needs a good signature and has none."""
        if needs_signature(trust or root.trust, its):
            from stitchcache.store.signed import require_signed_record

            require_signed_record(self, root.path, path, key, record, its)

    def _signature(self, kind: str, key: str, digest: str) -> bytes:
        from stitchcache.store.signed import own_signature

        return own_signature(self, self._top, kind, key, digest)

    def put_target(self, key: str, record: TargetRecord, *, signature: bytes | None = None) -> None:
        """Let a target key lead to an entry; the entry comes first.

        The record replaces the one with the same sources and globals, else it is added. Of more than eight
        records the oldest goes. Where two processes do this at once, the record of one may be lost: that
        costs a trace.

        Raises:
            StoreWriteError: The store cannot be written.
            EntryFormatError: A value in it has no form in the format.
        """
        from stitchcache.store.upkeep import standing

        others = [
            each
            for each in self.signed_records(key)
            if (each[0].sources, each[0].globals) != (record.sources, record.globals)
        ]
        if signature is None:
            signature = self._signature("target", key, entry.packed_digest(record))
        records, signatures = zip(*[(record, signature), *others][: entry.MOST_RECORDS], strict=True)
        data = entry.encode_target(key, records, signatures)
        entry.decode_signed(data, key)
        entry.unpack_factors(record.factors)
        path = keyed_path(self._top.path, Area.TARGETS, key)
        with self._top.writing(path):
            standing(self._top, Area.TARGETS, key, entry.decode_signed)
        self._top.publish(path, data)
        if self.remote and not signature.startswith(entry.OUTSIDE):
            self.tier.give(key, 0, partial(self.tier.send_target, self, key, record, signature))

    def get_piece(self, key: str) -> entry.PieceRecord | None:
        """The piece of a key, its blob kept until an artifact is put; ``None`` where either is gone."""
        record = self.record(Area.PIECES, key, entry.decode_piece)
        try:
            if record is not None and self._hold(record.blob):
                self.count("hit.piece")
                return record
        except OSError as error:
            self.warn(key, f"blob {key} of a piece cannot be read ({words(error)}): taken as missing")
        return None

    def put_piece(self, key: str, backend: str, blob: BlobRef, *, signature: bytes | None = None) -> None:
        """Note that a piece key's compiled piece is this blob; the blob comes first."""
        data = entry.encode_piece(entry.PieceRecord(key=check_key(key), backend=backend, blob=blob))
        entry.decode_piece(data, key)
        data = self._signed(entry.Kind.PIECE, key, data, signature)
        self._top.publish(keyed_path(self._top.path, Area.PIECES, key), data)
        self._send(Area.PIECES, key, data, blob)

    def record(self, area: Area, key: str, decode: Callable[..., T], *vouched: Any) -> T | None:
        """What a key's file holds; one that nobody vouches for is taken as missing, with a warning."""
        try:
            return self._first(area, key, decode, *vouched)
        except errors.UntrustedEntryError as error:
            self.warn(error.path, f"{error.message} (taken as missing)", cause="refused")
            return None

    # -- upkeep ------------------------------------------------------------------------------------

    def stats(self, headers: Iterable[entry.Header] = ()) -> CacheStats:
        """What the first root holds, and what was counted; ``headers`` that are known need no other look."""
        from stitchcache.store.upkeep import CacheStats, take_stock

        counters, since, _ = self._counters.read()
        try:
            return take_stock(self._top, counters, since, {each.path: each.file_bytes for each in headers})
        except OSError as error:
            self.warn(self._top.path, f"{self._top.path}: cannot be listed ({words(error)})")
            return CacheStats(counters=counters, since=since)

    def plan_prune(
        self,
        *,
        max_bytes: int | None = None,
        max_files: int | None = None,
        max_age: float | None = None,
        grace_seconds: float = 3600.0,
    ) -> PrunePlan:
        """What a prune of the first root would remove; nothing goes until the plan's ``execute()``.

        Args:
            max_bytes: Bytes that may stay; default the cache's own limit.
            max_files: Files that may stay; default the cache's own limit.
            max_age: Seconds since its last use after which an entry goes.
            grace_seconds: How long a blob that no entry names is left alone.
        """
        from stitchcache.store.evict import Look, plan_prune

        with self._listing():
            return plan_prune(
                Look(self._roots, grace_seconds),
                max_bytes=self.max_bytes if max_bytes is None else max_bytes,
                max_files=self.max_files if max_files is None else max_files,
                max_age=max_age,
            )

    def remove(self, graph_hashes: Collection[str]) -> PruneResult:
        """Remove entries of the first root that are not in use, and what nothing else needs then."""
        from stitchcache.store.evict import plan_removal

        with self._listing():
            plan = plan_removal(self._roots, graph_hashes)
        return plan.execute()

    def clear(self) -> PruneResult:
        """Remove all entries, blobs, targets and pieces of the first root that are not in use."""
        return self.plan_prune(max_bytes=0, max_files=0, grace_seconds=0.0).execute()

    def _keep_within_limits(self) -> None:
        """After a put: evict where a limit is crossed. One process at a time, and never an error."""
        if self.max_bytes is None and self.max_files is None:
            return
        from stitchcache.store.evict import enforce

        try:
            result = enforce(self._roots, max_bytes=self.max_bytes, max_files=self.max_files)
        except OSError as error:
            log("warning", "%s: the limits were not enforced: %s", self.root, error)
            return
        if result.entries:
            self.count("evicted", len(result.entries))
            said = f"evicted {len(result.entries)} entries, {result.files} files, {result.bytes} bytes"
            log("info", "%s: %s", self.root, said)

    def verify(self, repair: bool = False, *, require_signature: bool = False) -> VerifyReport:
        """Read and check every file of the first root.

        Args:
            repair: Move what is damaged to quarantine, and remove pointers that lead nowhere.
            require_signature: Also report what is not signed by a key that is trusted.
        """
        from stitchcache.store.upkeep import verify

        trust = "signed" if require_signature else None

        def admit(path: str, area: Area, key: str, data: bytes) -> None:
            if (trust or self._top.trust) == "owner":
                self._top.require_trust(path)
            self._admit(self._top, path, area, key, data, trust)
            if area is Area.TARGETS:
                for each in entry.decode_signed(data, key, path=path):
                    self._vouch(self._top, path, key, *each, trust)

        with self._listing():
            return verify(self._roots, repair=repair, admit=admit)

    def migrate(self) -> list[str]:
        """Rewrite the first root's legacy entries in the current format; each old file goes only after.

        Returns:
            Graph hashes of the entries that were rewritten. One that cannot be read is left, and warned of.
        """
        from stitchcache.store.upkeep import standing
        from stitchcache.types import ENTRY_VERSION

        with self._listing():
            legacy = [each for each in self._top.items(Area.ENTRIES) if each.path.endswith(LEGACY_SUFFIXES)]
        done = []
        for item in legacy:
            try:
                # What is written is ours, so nothing that others could have written becomes that.
                found = self._top.read(item.path, Area.ENTRIES, trusted=self._top.trust == "owner")
                if found is None:
                    continue
                self._admit(self._top, item.path, Area.ENTRIES, item.key, found[0])
                old = entry.decode_named(found[0], item.key, item.path)
            except (errors.EntryFormatError, OSError) as error:
                self.warn(item.path, f"{item.path}: cannot be read ({error}); it is left where it is")
                continue
            with self._top.writing(item.path):
                # An entry that was compiled since has more to it.
                if standing(self._top, Area.ENTRIES, item.key, entry.decode_named) is None:
                    self.put(replace(old, format_version=ENTRY_VERSION))
                self._files.unlink(item.path)
            done.append(item.key)
        return done

    @contextmanager
    def _listing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            said = f"{error.filename or self.root}: cannot be listed ({words(error)})"
            raise errors.StoreError(said, path=str(self.root)) from error


def chosen_cache(cache: Cache | None) -> Cache:
    """The cache that a caller gave, or the default one; an ``OptionError`` for anything else."""
    errors.check_kind(
        "cache", cache, (Cache, NoneType), "a Cache: write cache=stitchcache.Cache(...) with its directory"
    )
    return Cache() if cache is None else cache
