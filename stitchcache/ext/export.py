"""Vouching for what a cache holds: signing it in place, exporting it to a bundle, pushing it to a remote."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from typing import Any

from stitchcache.artifact import entry as files
from stitchcache.cache import Cache
from stitchcache.errors import StitchCacheError, StoreError, UntrustedEntryError
from stitchcache.ext.bundle import BLOCK, SIGNATURE, Bundle, chunks, header, place
from stitchcache.ext.sign import YEAR, Keys
from stitchcache.records import dataclass
from stitchcache.remote.tier import object_name
from stitchcache.store import Area, key_of, keyed_path, write_error
from stitchcache.store.openssh import read_statement
from stitchcache.types import Artifact, BlobRef, is_digest

log = logging.getLogger("stitchcache")


def sign(cache: Cache, graph_hashes: Collection[str] = (), *, seconds: float = YEAR) -> list[str]:
    """Sign entries of the first root, with the target records that lead to them and their pieces.

    Signing vouches for what is there: only what the cache itself trusts is signed.

    Args:
        cache: Where they are. One with ``trust="owner"`` signs what its user has made.
        graph_hashes: Which ones; all where none is named.
        seconds: How long the signatures are good.

    Returns:
        Graph hashes of what was signed.

    Raises:
        UntrustedEntryError: There is no key, or an entry that was named is not trusted.
        StoreWriteError: The cache cannot be written.
    """
    keys: Keys = cache.keys
    signed, top = [], cache._top.path
    for item in list(cache._top.items(Area.ENTRIES)):
        artifact = _trusted(cache, item.key, graph_hashes)
        if artifact is None:
            continue
        digest = files.encode(artifact)[-files.DIGEST_SIZE :].hex()
        cache.put(artifact, signature=keys.sign("entry", item.key, digest, seconds=seconds))
        signed.append(item.key)
        for piece in {piece.key: piece for piece in artifact.pieces}.values():
            # An engine's pieces have names of their own, and no records.
            if is_digest(piece.key) and cache._top.facts(keyed_path(top, Area.PIECES, piece.key)):
                cache.put_piece(piece.key, piece.backend, piece.blob)
    for item in list(cache._top.items(Area.TARGETS)):
        # The oldest first, so that their order stays.
        for record in reversed(cache.get_target(item.key)):
            if record.graph_hash in signed:
                signature = keys.sign("target", item.key, files.packed_digest(record), seconds=seconds)
                cache.put_target(item.key, record, signature=signature)
    return sorted(signed)


def _trusted(cache: Cache, graph_hash: str, wanted: Collection[str]) -> Artifact | None:
    """An entry; ``None`` where it is not wanted, or is not trusted and was not asked for by name."""
    if wanted and graph_hash not in wanted:
        return None
    try:
        return cache.get(graph_hash)
    except UntrustedEntryError as error:
        if wanted:
            raise
        log.warning("left out: %s", error)
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Entries that are to leave a cache."""

    members: dict[str, bytes | BlobRef]  # by path below a root: entries, what leads to them, their blobs
    artifacts: dict[str, Artifact]  # the entries, by graph hash
    targets: int  # how many records lead to them
    signed: int  # Unix seconds of the newest signature of ours


def select(
    cache: Cache,
    graph_hashes: Collection[str] = (),
    *,
    label: str | None = None,
    target: str | None = None,
    max_age: float | None = None,
) -> Selection:
    """Choose entries; without a key, signatures stay as they are.

    Args:
        cache: Where they are. Only what it trusts is chosen.
        graph_hashes: Which ones; all where none is named.
        label: Only those with a label like this; ``*`` and ``?`` stand for others.
        target: Only those that a target key beginning so leads to.
        max_age: Only those compiled at most so many seconds ago.
    """
    keys: Keys | None = cache.keys if cache.keys.can_sign() else None
    found = {item.key for root in cache._roots for item in root.items(Area.TARGETS, target or "")}
    led = {key: cache.signed_records(key) for key in sorted(found)}
    ends = {record.graph_hash for records in led.values() for record, _ in records}
    wanted = _wanted(label, max_age)
    # Each comes after what it names.
    members: dict[str, bytes | BlobRef] = {}
    chosen: dict[str, Artifact] = {}
    signed = [0]
    for listed in cache.entries():
        key = listed.graph_hash
        if not wanted(listed) or (target is not None and key not in ends):
            continue
        artifact = _trusted(cache, key, graph_hashes)
        if artifact is not None:
            with open(listed.path, "rb") as file:
                there = files.signature_in(file.read())
            data = files.encode(artifact)
            own, created = _own_signature(keys, "entry", key, data[-files.DIGEST_SIZE :].hex(), there)
            members |= {object_name(Area.BLOBS, blob.digest): blob for blob in artifact.blobs}
            members[object_name(Area.ENTRIES, key)] = files.with_signature(data, files.Kind.ENTRY, own)
            chosen[key] = artifact
            signed.append(created)
    if not chosen:
        said = f"{cache.root}: no entry is asked for that is there and trusted"
        raise StoreError(said, path=str(cache.root))
    targets = 0
    for key, records in led.items():
        kept = [(record, its) for record, its in records if record.graph_hash in chosen]
        if kept:
            own_ones = [_own_signature(keys, "target", key, files.packed_digest(r), its) for r, its in kept]
            data = files.encode_target(key, [record for record, _ in kept], [own for own, _ in own_ones])
            members[object_name(Area.TARGETS, key)] = data
            targets += len(kept)
            signed += [created for _, created in own_ones]
    return Selection(members=members, artifacts=chosen, targets=targets, signed=max(signed))


def _wanted(label: str | None, max_age: float | None) -> Callable[[files.Header | Artifact], bool]:
    """Tells which entries have such a label and age."""
    oldest = -math.inf if max_age is None else time.time() - max_age
    return lambda entry: (label is None or fnmatchcase(entry.label, label)) and entry.created >= oldest


def export_bundle(
    cache: Cache, path: str | os.PathLike[str], graph_hashes: Collection[str] = (), **only: Any
) -> Bundle:
    """Write entries to a bundle, with all that a start elsewhere needs.

    Args:
        cache: Where they are. Only what it trusts is exported.
        path: The file to write; it replaces what has its name.
        graph_hashes: Which entries; all where none is named.
        **only: ``label``, ``target`` and ``max_age``, as :func:`select` takes them.

    Raises:
        UntrustedEntryError: There is no key to sign with, or an entry that was named is not trusted.
        StoreError: Nothing is there to export, or a blob is missing.
        StoreWriteError: The file cannot be written.
    """
    keys: Keys = cache.keys
    # Raises where there is none.
    signer = keys.name_of(keys.public())
    found = select(cache, graph_hashes, **only)
    path, digest = os.fspath(path), hashlib.sha256()
    with replacing(path) as temporary, open(cache._files.create(temporary), "wb") as file:

        def put(chunk: bytes) -> None:
            digest.update(chunk)
            file.write(chunk)

        for name in sorted(found.members, key=place):
            put_member(put, cache, name, found.members[name])
        whole = digest.hexdigest()
        put_member(put, cache, SIGNATURE, keys.sign("bundle", whole, whole, created=found.signed))
        put(bytes(2 * BLOCK))
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return Bundle(signer=signer, entries=tuple(sorted(found.artifacts)), targets=found.targets, bytes=size)


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """A path beside another; what the block puts there takes the other's place at the end, or goes."""
    temporary = f"{path}.{os.urandom(6).hex()}.part"
    try:
        yield temporary
        os.rename(temporary, path)
    except StitchCacheError:
        raise
    except OSError as error:
        raise write_error(error, path) from error
    finally:
        # A directory, or a file.
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            os.unlink(temporary)


def _own_signature(keys: Keys | None, kind: str, key: str, digest: str, there: bytes) -> tuple[bytes, int]:
    """Our signature and its time: the one that is there if it is good, so that bundles stay the same."""
    if keys is None:
        return there, 0
    there = there.removeprefix(files.OUTSIDE)
    try:
        said = keys.verify(there, kind, key, digest, path="")
        if read_statement(there)[0].public == keys.public():
            return there, said.created
    except UntrustedEntryError:
        pass
    made = keys.sign(kind, key, digest)
    return made, read_statement(made)[1].created


def put_member(
    put: Callable[[bytes], Any], cache: Cache, name: str, content: bytes | BlobRef, modified: int = 0
) -> None:
    """Write a member of a tar file, a blob's digest checked on the way."""
    size = len(content) if isinstance(content, bytes) else content.size
    try:
        put(header(name, size, modified))
    except ValueError as error:
        # A size has eleven octal digits.
        said = f"{name}: {size} bytes, and a tar file has room for less than 8 GiB: use a remote"
        raise StoreError(said, path=name) from error
    if isinstance(content, bytes):
        put(content)
    else:
        blob = cache.blob_path(content)
        if blob is None:
            raise StoreError(f"{cache.root}: blob {content.digest} is missing: compile again", path=name)
        found = hashlib.sha256()
        with open(blob, "rb") as file:
            for chunk in chunks(file, size):
                found.update(chunk)
                put(chunk)
        if found.hexdigest() != content.digest:
            raise StoreError(f"{blob}: changed while it was read", path=str(blob))
    put(bytes(-size % BLOCK))


_PUSHES = 8
# Seconds without an answer: nobody's start waits.
_PATIENCE = 30.0
Moved = dict[str, bool | str]
"""Graph hash to whether the entry was moved, or why not; ``False`` where it was there already."""


def push(
    cache: Cache,
    graph_hashes: Collection[str] = (),
    *,
    on_progress: Callable[[str], None] = log.info,
    **only: Any,
) -> Moved:
    """Upload entries to the cache's remote, with the target records that lead to them, unless it has them.

    Arguments are as for :func:`export_bundle`, and ``on_progress`` is told how far it is.

    Raises:
        OptionError: The cache has no remote.
        UntrustedEntryError: An entry that was named is not trusted.
        StoreError: Nothing is there to push, or the remote failed.
    """
    tier, moved = cache.tier, Moved()
    found = select(cache, graph_hashes, **only)

    def one(key: str) -> bool | str:
        data: Any = found.members[object_name(Area.ENTRIES, key)]
        try:
            return bool(tier.send(cache, Area.ENTRIES, key, data, found.artifacts[key].blobs))
        except OSError as error:
            # The remote's, a disk's, or a missing signature.
            return str(error)

    with ThreadPoolExecutor(_PUSHES, "stitchcache-push") as pool:
        for key, outcome in zip(found.artifacts, pool.map(one, found.artifacts), strict=True):
            moved[key] = outcome
            on_progress(f"{len(moved)} of {len(found.artifacts)}: {key[:12]}")
    for name, packed in found.members.items():
        if name.startswith(Area.TARGETS) and isinstance(packed, bytes):
            key = name.rpartition("/")[2]
            for record, its in reversed(files.decode_signed(packed, key)):
                if not isinstance(moved[record.graph_hash], str):
                    tier.send_target(cache, key, record, its)
    return moved


def pull(
    cache: Cache,
    prefixes: Collection[str] = (),
    *,
    label: str | None = None,
    target: str | None = None,
    max_age: float | None = None,
    on_progress: Callable[[str], None] = log.info,
) -> Moved:
    """Store entries of the cache's remote, with what leads to them; arguments are as for :func:`push`.

    A start needs no pull. It is for images, and for nodes that will have no network.
    """
    tier, moved, led = cache.tier, Moved(), dict[str, set[str]]()
    chosen = _wanted(label, max_age)

    def keys(area: Area, prefixes: Collection[str]) -> list[str]:
        tier.remote.begin(_PATIENCE)
        names = [each["path"].rpartition("/")[2] for each in tier.remote.now(tier.remote.listed, area) or ()]
        found = [key for key in (key_of(area, name) for name in names) if key is not None]
        return [key for key in found if key.startswith(tuple(prefixes) or "")]

    for name, found, _ in tier.read(
        cache, Area.TARGETS, keys(Area.TARGETS, [target or ""]), files.decode_signed
    ):
        led[name.rpartition("/")[2]] = {record.graph_hash for record, _ in found}
    ends = set().union(*led.values())
    wanted = [key for key in keys(Area.ENTRIES, prefixes) if target is None or key in ends]
    for done, key in enumerate(wanted, 1):
        tier.remote.begin(_PATIENCE)
        moved[key] = tier.remote.reason or "not trusted, or damaged"
        for name, artifact, its in tier.read(cache, Area.ENTRIES, [key], files.decode_named):
            if not chosen(artifact):
                del moved[key]
            elif (there := cache.get(key) is not None) or tier.keep(cache, name, artifact, its):
                moved[key] = not there
        on_progress(f"{done} of {len(wanted)}: {key[:12]}")
    here = {key for key, outcome in moved.items() if not isinstance(outcome, str)}
    for key in [key for key, found in led.items() if found & here]:
        tier.records(cache, key)
    return moved
