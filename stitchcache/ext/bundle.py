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
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from stitchcache.artifact.entry import (
    DIGEST_SIZE,
    OUTSIDE,
    Kind,
    SignedRecords,
    decode_named,
    decode_signed,
    encode,
    packed_digest,
    signature_in,
    signed_digest,
)
from stitchcache.cache import Cache
from stitchcache.errors import EntryFormatError, StoreError, UntrustedEntryError
from stitchcache.ext.sign import Keys, Statement, read_statement
from stitchcache.records import dataclass
from stitchcache.store import CAP, Area, key_of, keyed_path, words
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
    """What a bundle holds, or what became of it.

    Args:
        signer: Who signed it.
        entries: Graph hashes of its entries.
        kept: Those of them that the cache had already, its own or newer; they stay as they were.
        targets: How many target records lead to them.
        bytes: Size of the file.
    """

    signer: str
    entries: tuple[str, ...]
    kept: tuple[str, ...] = ()
    targets: int = 0
    bytes: int = 0


def header(name: str, size: int, modified: int = 0) -> bytes:
    """A member's header; who writes it, where and when is not in it. A directory's name ends in a slash."""
    info = tarfile.TarInfo(name.rstrip("/"))
    info.size, info.mode, info.mtime = size, 0o644, modified
    if name.endswith("/"):
        info.type, info.mode = tarfile.DIRTYPE, 0o755
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def place(name: str) -> tuple[int, str]:
    """What members are sorted by."""
    area = name.partition("/")[0]
    return (_AREAS.index(Area(area)) if area != SIGNATURE else len(_AREAS)), name


def chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """So many bytes, or fewer at the file's end."""
    while size > 0 and (chunk := file.read(min(size, _CHUNK))):
        yield chunk
        size -= len(chunk)


# -- import ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    name: str
    area: Area | None
    key: str
    begin: int
    size: int


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
    except OSError as error:
        if isinstance(error, (StoreError, UntrustedEntryError)):
            raise
        raise StoreError(f"{path}: cannot be read ({words(error)})", path=path) from error


class _Import:
    def __init__(self, cache: Cache, path: str, file: BinaryIO) -> None:
        self._cache, self._path, self._file = cache, path, file
        self._keys: Keys = cache.keys
        self._entries: dict[str, tuple[Artifact, bytes]] = {}
        self._targets: dict[str, SignedRecords] = {}

    def _refuse(self, name: str, reason: str) -> EntryFormatError:
        return EntryFormatError.at(self._path, name, f"{reason}; nothing of the bundle was stored")

    def run(self) -> Bundle:
        members, said = self._walk()
        self._check(members)
        kept = self._store({member.key: member for member in members if member.area is Area.BLOBS})
        return Bundle(
            signer=said.signer,
            entries=tuple(self._entries),
            kept=tuple(kept),
            targets=sum(map(len, self._targets.values())),
            bytes=os.fstat(self._file.fileno()).st_size,
        )

    def _walk(self) -> tuple[list[_Member], Statement]:
        """Members in their order, and what the signature over all of them says. Nothing is decoded."""
        members: list[_Member] = []
        digest, last = hashlib.sha256(), (-1, "")
        while True:
            member = self._next()
            if place(member.name) <= last or len(members) == _MOST_MEMBERS:
                raise self._refuse(member.name, "it is there twice, or not in its place")
            last = place(member.name)
            if member.area is None:
                break
            members.append(member)
            self._file.seek(member.begin - BLOCK)
            for chunk in chunks(self._file, BLOCK + member.size + -member.size % BLOCK):
                digest.update(chunk)
            self._file.seek(member.begin + member.size)
            self._zeros(-member.size % BLOCK, member.name)
        signature = self._file.read(min(member.size, 2 * BLOCK * 4))
        self._zeros(-member.size % BLOCK + 2 * BLOCK, "end")
        if self._file.read(1):
            raise self._refuse("end", "bytes follow the end")
        whole = digest.hexdigest()
        return members, self._keys.verify(signature, "bundle", whole, whole, path=self._path)

    def _next(self) -> _Member:
        begin = self._file.tell() + BLOCK
        block = self._file.read(BLOCK)
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
            canonical = header(info.name, info.size) == block
        except (tarfile.HeaderError, ValueError) as error:
            raise self._refuse(f"byte {begin - BLOCK}", f"no header of a member ({error})") from None
        name = info.name
        parts = name.split("/")
        area = next((each for each in _AREAS if each == parts[0]), None)
        key = key_of(area, parts[-1]) if area is not None else None
        named = keyed_path("", area, key)[1:] == name if area and key else name == SIGNATURE
        # So there are no links, no owners, no paths of another kind, no extensions.
        if not canonical or not named:
            raise self._refuse(name, "not a member as bundles have them")
        if area is not None and info.size > CAP.get(area, info.size):
            raise self._refuse(name, f"{info.size} bytes are too many")
        return _Member(name=name, area=area, key=key or "", begin=begin, size=info.size)

    def _zeros(self, size: int, name: str) -> None:
        if self._file.read(size) != bytes(size):
            raise self._refuse(name, "it ends too early, or something stands between the members")

    def _check(self, members: Sequence[_Member]) -> None:
        """Every signature, every record, and that nothing is missing or left over."""
        blobs: dict[str, int] = {}
        total = 0
        for member in members:
            self._file.seek(member.begin)
            if member.area is Area.BLOBS:
                self._check_blob(member)
                blobs[member.key] = member.size
                continue
            total += member.size
            if total > _MOST_BYTES:
                raise self._refuse(
                    member.name, f"its entries have more than {_MOST_BYTES} bytes: make several"
                )
            data = b"".join(chunks(self._file, member.size))
            where = f"{self._path}: {member.name}"
            if member.area is Area.ENTRIES:
                signature, digest = signature_in(data), signed_digest(data, Kind.ENTRY)
                self._keys.verify(signature, "entry", member.key, digest, path=where)
                artifact = decode_named(data, member.key, where)
                # What is stored is written anew, and the signature has to be good for that too.
                if encode(artifact)[-DIGEST_SIZE:].hex() != digest:
                    raise self._refuse(member.name, "these are not the bytes that stitchcache writes for it")
                self._entries[member.key] = artifact, signature
                continue
            found = decode_signed(data, member.key, path=where)
            for record, signature in found:
                self._keys.verify(signature, "target", member.key, packed_digest(record), path=where)
                if record.graph_hash not in self._entries:
                    raise self._refuse(member.name, f"it leads to {record.graph_hash}, which is not there")
            self._targets[member.key] = found
        named = {blob.digest: blob.size for artifact, _ in self._entries.values() for blob in artifact.blobs}
        if named != blobs:
            wrong = min(key for key in {*named, *blobs} if named.get(key) != blobs.get(key))
            raise self._refuse(f"blob {wrong}", "missing, of another size, or named by no entry")

    def _check_blob(self, member: _Member) -> None:
        digest = hashlib.sha256()
        for chunk in chunks(self._file, member.size):
            digest.update(chunk)
        if digest.hexdigest() != member.key:
            raise self._refuse(member.name, "its bytes do not match its name")

    def _store(self, blobs: dict[str, _Member]) -> list[str]:
        """Blobs, entries, records, in this order; the entries that were there already."""
        cache, kept = self._cache, []
        for key, (artifact, signature) in self._entries.items():
            if self._is_newer(keyed_path(cache._top.path, Area.ENTRIES, key), key, signature):
                kept.append(key)
                continue
            for ref in artifact.blobs:
                member = blobs[ref.digest]
                self._file.seek(member.begin)
                if publish_blob(cache._top, chunks(self._file, member.size)) != ref:
                    raise self._refuse(member.name, "the file was changed while it was read")
            cache.put(artifact, signature=OUTSIDE + signature)
        for key, found in self._targets.items():
            there = {(r.sources, r.globals): its for r, its in cache.signed_records(key)}
            # The oldest first, so that their order stays.
            for record, signature in reversed(found):
                its = there.get((record.sources, record.globals))
                if its is None or (its.startswith(OUTSIDE) and _created(its) < _created(signature)):
                    cache.put_target(key, record, signature=OUTSIDE + signature)
        return kept

    def _is_newer(self, path: str, key: str, signature: bytes) -> bool:
        """Whether the entry that is there is trusted, and is the cache's own or was signed later."""
        root = self._cache._top
        try:
            found = root.read(path, Area.ENTRIES, trusted=root.trust == "owner")
            if found is None:
                return False
            self._cache._admit(root, path, Area.ENTRIES, key, found[0])
            decode_named(found[0], key, path)
        except (EntryFormatError, UntrustedEntryError):
            return False
        there = signature_in(found[0])
        return not there.startswith(OUTSIDE) or _created(there) >= _created(signature)


def _created(signature: bytes) -> int:
    return read_statement(signature.removeprefix(OUTSIDE))[1].created if signature else 0
