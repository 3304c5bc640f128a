"""The tier behind the roots: what a remote has is verified, stored locally, and only then used.

Objects lie as files do in a root, in ``entries``, ``targets``, ``pieces`` and ``blobs``. Each is written
once, after what it names; only the records of a target are written again. A start from an empty root reads a
target, an entry and its distinct blobs, and lists nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stitchcache import errors
from stitchcache.artifact import entry as files
from stitchcache.artifact.entry import OUTSIDE, Kind
from stitchcache.remote import GRACE, Flight, Leases, Remote, elapsed, put_at
from stitchcache.store import Area, keyed_path, signed
from stitchcache.store.publish import publish_blob
from stitchcache.store.store import log, needs_signature
from stitchcache.types import Artifact, BlobRef, TargetRecord

if TYPE_CHECKING:
    from stitchcache.cache import Cache

T = TypeVar("T")

# A file is held in memory until it is verified.
MOST_BYTES = 64 << 20
# Seconds that an upload may take, and one more a MiB: the start that waits for it has compiled for longer.
_UPLOAD = 10.0
# Seconds for which a blob that was put, and then for which one that was seen, is taken to be there.
_RELIED_ON = GRACE / 4


def object_name(area: Area, key: str) -> str:
    """The object of a key."""
    return keyed_path("", area, key)[1:]


def _identity(record: TargetRecord) -> tuple[object, ...]:
    return (record.sources, record.globals)


class Tier:
    """A cache's remote. Methods take the cache, which owns this object."""

    def __init__(self, url: str, count: Callable[..., None]) -> None:
        self._count = count
        self.remote = Remote(url, count)
        self.leases = Leases(self.remote)
        self._bad: set[str] = set()  # objects that were refused, which the next upload replaces
        self._there: dict[BlobRef, float] = {}  # blobs that the remote has, and when that was seen

    def records(self, cache: Cache, key: str) -> tuple[TargetRecord, ...]:
        """Records of a target key that the cache lacks, stored in it, newest first; a start begins here."""
        self.remote.begin()
        there, good = {_identity(record) for record in cache.get_target(key)}, []
        for name, found, _ in self.read(cache, Area.TARGETS, [key], files.decode_signed):
            for record, its in found:
                try:
                    if _identity(record) not in there:
                        if self._needs(cache):
                            path, url = self.remote.at(name), self.remote.url
                            signed.require_signed_record(cache, url, path, key, record, its)
                        good.append((record, OUTSIDE + its.removeprefix(OUTSIDE)))
                except errors.UntrustedEntryError as error:
                    self._refuse(cache, name, error)
        # The oldest first, so that their order stays.
        puts = [partial(cache.put_target, key, r, signature=its) for r, its in reversed(good)]
        return tuple(record for record, _ in good) if all(self._stored(cache, put) for put in puts) else ()

    def entry(self, cache: Cache, key: str) -> Artifact | None:
        """The entry of a graph hash, stored in the cache with its blobs; ``None`` where it cannot be had."""
        found = self.read(cache, Area.ENTRIES, [key], files.decode_named)
        return next((each[1] for each in found if self.keep(cache, *each)), None)

    def keep(self, cache: Cache, name: str, artifact: Artifact, its: bytes) -> bool:
        """Store an entry that was read, after its blobs."""
        whole = self._blobs(cache, artifact.blobs, [name])
        if not whole or not self._stored(cache, partial(cache.put, artifact, signature=its)):
            return False
        cache.count("fetched")
        cache.count("fetched.bytes", sum(blob.size for blob in artifact.blobs))
        log("info", "fetched %s", self.remote.at(name))
        return True

    def pieces(self, cache: Cache, keys: Collection[str]) -> None:
        """Store pieces that the remote has, with their blobs; what it lacks is passed over."""
        found = list(self.read(cache, Area.PIECES, keys, files.decode_piece))
        self._blobs(cache, [piece.blob for _, piece, _ in found], [name for name, _, _ in found])
        for _, piece, its in found:
            put = partial(cache.put_piece, piece.key, piece.backend, piece.blob, signature=its)
            if self._stored(cache, partial(cache._hold, piece.blob)):
                self._stored(cache, put)

    @contextmanager
    def share(
        self, cache: Cache, keys: Collection[str], found: Callable[[str], bool], on_wait: Callable[[], None]
    ) -> Iterator[Iterable[Collection[str]]]:
        """Batches of pieces to compile here; what other nodes compile meanwhile is fetched.

        ``found`` takes a piece that was fetched, and says whether it can be used.
        """
        # The remote may have cost this start its wait already; and who cannot upload must not stop others.
        mute = cache.read_only or self.remote.registry or (self._needs(cache) and not cache.keys.can_sign())
        if mute or self.remote.left <= 0 or not self.remote.usable:
            yield [keys]
            return

        def fetched(some: Collection[str]) -> list[str]:
            self.remote.begin()
            self.pieces(cache, some)
            return [key for key in some if found(key)]

        try:
            yield self.leases.share(keys, fetched, on_wait)
        finally:
            self.leases.release(keys)

    def read(
        self, cache: Cache, area: Area, keys: Collection[str], decode: Callable[..., T]
    ) -> Iterator[tuple[str, T, bytes]]:
        """Object, content, and signature to store it with, of those files that are there and good."""
        names = [object_name(area, key) for key in keys] if not cache.read_only else []
        reads = [partial(self.remote.read, name, MOST_BYTES) for name in names]
        for key, name, data in zip(keys, names, self.remote.gather(reads), strict=False):
            try:
                if data is not None:
                    path = self.remote.at(name)
                    found = decode(data, key, path=path)
                    if area is not Area.TARGETS and self._needs(cache):
                        signed.require_signed_file(cache, self.remote.url, path, area, key, data)
                    yield name, found, OUTSIDE + files.signature_in(data).removeprefix(OUTSIDE)
            except (errors.EntryFormatError, errors.UntrustedEntryError) as error:
                self._refuse(cache, name, error)

    def _needs(self, cache: Cache) -> bool:
        """Whether what comes from outside needs a good signature."""
        return needs_signature(cache._top.trust, OUTSIDE)

    def _blobs(self, cache: Cache, refs: Iterable[BlobRef], names: Sequence[str]) -> bool:
        """Store blobs that the cache lacks; whether all are there. ``names`` are the objects naming them."""
        missing = [ref for ref in dict.fromkeys(refs) if not self._stored(cache, partial(cache._hold, ref))]
        jobs = [partial(self._blob, cache, ref) for ref in missing]
        got = self._stored(cache, lambda: all(self.remote.gather(jobs)))
        if not got and any(object_name(Area.BLOBS, ref.digest) in self._bad for ref in missing):
            # The next compilation makes other bytes, so what leads to these has to go too.
            self._bad.update(names)
        return got

    def _blob(self, cache: Cache, ref: BlobRef, flight: Flight) -> bool:
        name = object_name(Area.BLOBS, ref.digest)
        try:
            publish_blob(cache._top, self.remote.chunks(name, ref.size, flight), expected=ref)
            return True
        except FileNotFoundError:
            self._refuse(cache, name, errors.StoreError("an entry or a piece names it, and it is gone"))
        except errors.EntryFormatError as error:
            self._refuse(cache, name, error)
        return False

    def _refuse(self, cache: Cache, name: str, error: errors.StitchCacheError) -> None:
        """Take an object for missing, with one warning; a newer stitchcache's is not replaced."""
        if not isinstance(error, errors.FutureFormatError):
            self._bad.add(name)
        path, said = self.remote.at(name), error.message
        self._count("remote.refused")
        cache.warn(path, f"{said if path in said else f'{path}: {said}'} (taken as missing)", cause="refused")

    def _stored(self, cache: Cache, put: Callable[[], object]) -> bool:
        """Store something, or ask whether it is stored; where the disk refuses, it is not."""
        try:
            return put() is not False
        except OSError as error:
            cache.warn(cache._top.path, f"nothing is fetched from {self.remote.url}: {error}")
            return False

    def give(self, key: str, size: int, send: Callable[[], object]) -> None:
        """Upload what was stored now; a failure costs this start no more than its time."""

        def job(_flight: Flight) -> None:
            send()
            # Others can have it from now on.
            self.leases.release([key])

        try:
            if self.remote.left > 0:
                self.remote.gather([job], _UPLOAD + size / (1 << 20))
        except (errors.StitchCacheError, OSError) as error:
            # The remote has told of its own failures; a file that is gone was evicted meanwhile.
            log("info", "not uploaded: %s", error)

    def send(self, cache: Cache, area: Area, key: str, data: bytes, blobs: Iterable[BlobRef]) -> bool:
        """Upload a file after the blobs that it names, unless the remote has it; whether it was sent."""
        name, its = object_name(area, key), files.signature_in(data)
        self._require(cache, its.removeprefix(OUTSIDE))
        if name not in self._bad and self.remote.now(self.remote.ask, "head", name) is not None:
            return False
        unseen = [ref for ref in blobs if elapsed() - self._there.get(ref, -_RELIED_ON) >= _RELIED_ON]
        found = [ref for ref in unseen if self._send_blob(cache, ref)]
        # A prune may have seen one when it was older, and remove it yet: see remote/prune.py.
        pruned = self.remote.now(self.remote.being_pruned) if found else False
        if pruned or not all(map(self._blob_there, found)):
            raise errors.StoreError(f"{self.remote.url}: it is being pruned: upload again later", path=name)
        self._there.update(dict.fromkeys(unseen, elapsed()))
        if its.startswith(OUTSIDE):
            data = files.with_signature(data, Kind.ENTRY, its.removeprefix(OUTSIDE))
        return self._write(name, data, name in self._bad)

    def _write(self, name: str, source: bytes | Path, replace: bool) -> bool:
        sent = bool(self.remote.now(self.remote.write, name, source, replace=replace))
        if sent:
            self._bad.discard(name)
            self._count("uploaded")
            self._count("uploaded.bytes", len(source) if isinstance(source, bytes) else source.stat().st_size)
        return sent

    def _require(self, cache: Cache, signature: bytes) -> None:
        if not signature and self._needs(cache):
            why = "not signed, so no node would load it: 'stitchcache keys generate NAME' makes a key"
            said = f"{self.remote.url}: what is compiled here is not uploaded, as it is {why}"
            cache.warn(self.remote.url, said)
            raise errors.UntrustedEntryError(said, path=self.remote.url)

    def _blob_there(self, ref: BlobRef) -> Any:
        return self.remote.now(self.remote.ask, "head", object_name(Area.BLOBS, ref.digest))

    def _send_blob(self, cache: Cache, ref: BlobRef) -> bool:
        """Upload a blob, unless it is there and was put not long ago; whether it was there."""
        name, there = object_name(Area.BLOBS, ref.digest), self._blob_there(ref)
        fits = there is not None and name not in self._bad and there["size"] == ref.size
        if not fits or time.time() - put_at(there) > _RELIED_ON:
            with cache.opened([ref]) as (path,):
                if path is None:
                    raise errors.StoreError(f"{cache.root}: blob {ref.digest} is gone", path=str(cache.root))
                self._write(name, path, True)
        return there is not None

    def send_target(self, cache: Cache, key: str, record: TargetRecord, signature: bytes) -> None:
        """Add a record to those of a target key, as :meth:`stitchcache.Cache.put_target` does.

        Where two nodes do this at once, the record of one may be lost: that costs a trace.
        """
        name, its = object_name(Area.TARGETS, key), signature.removeprefix(OUTSIDE)
        self._require(cache, its)
        data = self.remote.now(self.remote.read, name, MOST_BYTES)
        found: files.SignedRecords = ()
        try:
            if data is not None and name not in self._bad:
                found = files.decode_signed(data, key, path=self.remote.at(name))
        except errors.FutureFormatError:
            return
        except errors.EntryFormatError as error:
            self._refuse(cache, name, error)
        others = [each for each in found if _identity(each[0]) != _identity(record)]
        same = [each for each, _ in found if _identity(each) == _identity(record)]
        if not same or same[0].graph_hash != record.graph_hash:
            records, signatures = zip(*[(record, its), *others][: files.MOST_RECORDS], strict=True)
            self._write(name, files.encode_target(key, records, signatures), True)
