"""Bundles: what one is made of, and storing it in a cache.

A bundle is a plain tar file. The same entries, signed by the same key, are the same bytes::

    entries/<2 hex>/<graph hash>.stitch     each with a signature
    targets/<2 hex>/<target key>            the records that lead to them, each with a signature
    blobs/<2 hex>/<sha256>                  what the entries name
    signature                               over every byte before it

Nothing of a bundle is stored before all of it was checked.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from stitchcache.artifact import entry as files
from stitchcache.cache import Cache
from stitchcache.errors import EntryFormatError, StitchCacheError, StoreError, UntrustedEntryError
from stitchcache.ext.sign import Keys
from stitchcache.records import dataclass
from stitchcache.remote.tier import object_name
from stitchcache.store import CAP, Area, key_of, keyed_path, words
from stitchcache.store.openssh import Statement, read_statement
from stitchcache.store.publish import publish_blob
from stitchcache.types import Artifact

_AREAS = (Area.ENTRIES, Area.TARGETS, Area.BLOBS)
SIGNATURE = "signature"
BLOCK = 512
_CHUNK = 1 << 20
# Entries and targets are held in memory until all is checked.
_MOST_BYTES = 256 << 20
_MOST_MEMBERS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """What a bundle holds, or what became of it."""

    signer: str  # who signed it
    entries: tuple[str, ...]  # graph hashes
    kept: tuple[str, ...] = ()  # those that the cache had already, its own or newer: they stay as they were
    targets: int = 0  # how many target records lead to the entries
    bytes: int = 0  # of the file


def header(name: str, size: int, modified: int = 0) -> bytes:
    """A member's header; who writes it, where and when is not in it. A directory's name ends in a slash."""
    info = tarfile.TarInfo(name.rstrip("/"))
    info.size, info.mode, info.mtime = size, 0o644, modified
    if name.endswith("/"):
        info.type, info.mode = tarfile.DIRTYPE, 0o755
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def key_in(name: str) -> tuple[Area, str] | None:
    """Area and key in a member's name; ``None`` for the signature, and for what no bundle has."""
    area, _, rest = name.partition("/")
    key = key_of(Area(area), rest[3:]) if area in _AREAS else None
    return (Area(area), key) if key and object_name(Area(area), key) == name else None


def place(name: str) -> tuple[int, str]:
    """What members are sorted by."""
    area = name.partition("/")[0]
    return (_AREAS.index(Area(area)) if area != SIGNATURE else len(_AREAS)), name


def chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """So many bytes, or fewer at the file's end."""
    while size > 0 and (chunk := file.read(min(size, _CHUNK))):
        yield chunk
        size -= len(chunk)


def import_bundle(cache: Cache, path: str | os.PathLike[str]) -> Bundle:
    """Store what a bundle holds, if a key that the user trusts has signed all of it.

    Every start from it checks the signatures again. What the cache has already stays: its own, and what was
    signed later.

    Args:
        cache: Where to store it.
        path: The bundle.

    Returns:
        What it held, and what was there already.

    Raises:
        EntryFormatError: It is no bundle, or some part of it is wrong; nothing was stored.
        UntrustedEntryError: It is not signed by a key that is trusted; nothing was stored.
        StoreError: It cannot be read, or not be stored.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            return _Import(cache, path, file).run()
    except StitchCacheError:
        raise
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({words(error)})", path=path) from error


class _Import:
    def __init__(self, cache: Cache, path: str, file: BinaryIO) -> None:
        self._cache, self._path, self._file = cache, path, file
        self._keys: Keys = cache.keys
        # By name: area and key, where its bytes begin, and how many there are.
        self._members: dict[str, tuple[Area, str, int, int]] = {}
        self._entries: dict[str, tuple[Artifact, bytes]] = {}
        self._targets: dict[str, files.SignedRecords] = {}

    def _refuse(self, name: str, reason: str) -> EntryFormatError:
        return EntryFormatError.at(self._path, name, f"{reason}; nothing of the bundle was stored")

    def run(self) -> Bundle:
        said = self._walk()
        self._check()
        kept = tuple(self._store())
        return Bundle(
            signer=said.signer,
            entries=tuple(self._entries),
            kept=kept,
            targets=sum(map(len, self._targets.values())),
            bytes=os.fstat(self._file.fileno()).st_size,
        )

    def _bytes(self, begin: int, size: int) -> Iterator[bytes]:
        self._file.seek(begin)
        return chunks(self._file, size)

    def _digest(self, begin: int, size: int) -> str:
        digest = hashlib.sha256()
        for chunk in self._bytes(begin, size):
            digest.update(chunk)
        return digest.hexdigest()

    def _walk(self) -> Statement:
        """Find all members; what the signature over them says. Nothing is decoded."""
        last = (-1, "")
        while last[1] != SIGNATURE:
            name, size = self._header()
            if place(name) <= last or len(self._members) == _MOST_MEMBERS:
                raise self._refuse(name, "it is there twice, or not in its place")
            last, found, begin = place(name), key_in(name), self._file.tell()
            if found is not None:
                self._members[name] = (*found, begin, size)
            self._file.seek(begin + size)
            zeros = bytes(-size % BLOCK + (0 if found else 2 * BLOCK))
            if self._file.read(len(zeros)) != zeros:
                raise self._refuse(name, "it ends too early, or something stands between the members")
        if self._file.read(1):
            raise self._refuse("end", "bytes follow the end")
        whole = self._digest(0, begin - BLOCK)
        signature = b"".join(self._bytes(begin, min(size, 8 * BLOCK)))
        return self._keys.verify(signature, "bundle", whole, whole, path=self._path)

    def _header(self) -> tuple[str, int]:
        """Name and size of the member that begins here."""
        at, block = self._file.tell(), self._file.read(BLOCK)
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
            canonical = header(info.name, info.size) == block
        except (tarfile.HeaderError, ValueError) as error:
            raise self._refuse(f"byte {at}", f"no header of a member ({error})") from None
        found = key_in(info.name)
        # So there are no links, no owners, no paths of another kind, no extensions.
        if not canonical or (found is None and info.name != SIGNATURE):
            raise self._refuse(info.name, "not a member as bundles have them")
        if found is not None and info.size > CAP.get(found[0], info.size):
            raise self._refuse(info.name, f"{info.size} bytes are too many")
        return info.name, info.size

    def _check(self) -> None:
        """Every signature, every record, and that nothing is missing or left over."""
        blobs: dict[str, int] = {}
        total = 0
        for name, (area, key, begin, size) in self._members.items():
            if area is Area.BLOBS:
                if self._digest(begin, size) != key:
                    raise self._refuse(name, "its bytes do not match its name")
                blobs[key] = size
                continue
            total += size
            if total > _MOST_BYTES:
                raise self._refuse(name, f"its entries have more than {_MOST_BYTES} bytes: make several")
            data, where = b"".join(self._bytes(begin, size)), f"{self._path}: {name}"
            if area is Area.ENTRIES:
                signature, digest = files.signature_in(data), files.signed_digest(data, files.Kind.ENTRY)
                self._keys.verify(signature, "entry", key, digest, path=where)
                artifact = files.decode_named(data, key, where)
                # What is stored is written anew, and the signature has to be good for that too.
                if files.encode(artifact)[-files.DIGEST_SIZE :].hex() != digest:
                    raise self._refuse(name, "these are not the bytes that stitchcache writes for it")
                self._entries[key] = artifact, signature
                continue
            self._targets[key] = files.decode_signed(data, key, path=where)
            for record, signature in self._targets[key]:
                self._keys.verify(signature, "target", key, files.packed_digest(record), path=where)
                if record.graph_hash not in self._entries:
                    raise self._refuse(name, f"it leads to {record.graph_hash}, which is not there")
        named = {blob.digest: blob.size for artifact, _ in self._entries.values() for blob in artifact.blobs}
        if named != blobs:
            wrong = min(key for key in {*named, *blobs} if named.get(key) != blobs.get(key))
            raise self._refuse(f"blob {wrong}", "missing, of another size, or named by no entry")

    def _store(self) -> Iterator[str]:
        """Store blobs, entries and records, in this order; the entries that were there already."""
        cache = self._cache
        for key, (artifact, signature) in self._entries.items():
            if self._is_newer(key, signature):
                yield key
                continue
            for ref in artifact.blobs:
                _, _, begin, size = self._members[object_name(Area.BLOBS, ref.digest)]
                publish_blob(cache._top, self._bytes(begin, size), expected=ref)
            cache.put(artifact, signature=files.OUTSIDE + signature)
        for key, found in self._targets.items():
            there = {(r.sources, r.globals): its for r, its in cache.signed_records(key)}
            # The oldest first, so that their order stays.
            for record, signature in reversed(found):
                its = there.get((record.sources, record.globals))
                if its is None or (its.startswith(files.OUTSIDE) and _created(its) < _created(signature)):
                    cache.put_target(key, record, signature=files.OUTSIDE + signature)

    def _is_newer(self, key: str, signature: bytes) -> bool:
        """Whether the entry that is there is trusted, and is the cache's own or was signed later."""
        root = self._cache._top
        path = keyed_path(root.path, Area.ENTRIES, key)
        try:
            found = root.read(path, Area.ENTRIES, trusted=root.trust == "owner")
            if found is None:
                return False
            self._cache._admit(root, path, Area.ENTRIES, key, found[0])
            files.decode_named(found[0], key, path)
        except (EntryFormatError, UntrustedEntryError):
            return False
        there = files.signature_in(found[0])
        return not there.startswith(files.OUTSIDE) or _created(there) >= _created(signature)


def _created(signature: bytes) -> int:
    return read_statement(signature.removeprefix(files.OUTSIDE))[1].created if signature else 0
