"""What lies in a root, and what its files name: for statistics, eviction and verification.

The format itself stays outside this layer; :class:`Codec` is what it needs of it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from stitchcache.errors import EntryFormatError, FutureFormatError
from stitchcache.store.files import Files, close_quietly, read_exactly
from stitchcache.store.layout import (
    KEYED,
    LEGACY_SUFFIXES,
    MAX_LEGACY,
    MAX_RECORD,
    Area,
    key_of,
    keyed_path,
)
from stitchcache.store.locks import is_dead, try_lock
from stitchcache.store.root import Root
from stitchcache.types import is_digest


@dataclass(frozen=True, slots=True)
class Item:
    """A file as a scan saw it.

    Args:
        path: Where it lies.
        key: The key in its name; the whole name for files without one.
        size: Bytes.
        modified: mtime in nanoseconds: the last noted use.
        inode: Which file it was.
    """

    path: str
    key: str
    size: int
    modified: int
    inode: int


def keyed_items(root: Root, area: Area) -> Iterator[Item]:
    """Files of an area that is divided by key; foreign files are passed over.

    Raises:
        OSError: A directory cannot be listed.
    """
    for shard in root.scan(root.area(area)):
        if len(shard.name) != 2:
            continue
        for entry in root.scan(shard.path):
            key = key_of(area, entry.name)
            item = None if key is None else _item(root, entry, key)
            if item is not None:
                yield item


def legacy_items(root: Root) -> Iterator[Item]:
    """Entries of formats 0 to 2.

    Raises:
        OSError: The root cannot be listed.
    """
    for entry in root.scan(root.path):
        stem, suffix = os.path.splitext(entry.name)
        if suffix in LEGACY_SUFFIXES and is_digest(stem):
            item = _item(root, entry, stem)
            if item is not None:
                yield item


def flat_items(root: Root, area: Area) -> Iterator[Item]:
    """Files and directories right under an area.

    Raises:
        OSError: It cannot be listed.
    """
    for entry in root.scan(root.area(area)):
        item = _item(root, entry, entry.name)
        if item is not None:
            yield item


def totals(root: Root) -> dict[Area, tuple[int, int]]:
    """Files and bytes of each keyed area and the quarantine; older formats count as entries.

    Raises:
        OSError: A directory cannot be listed.
    """
    sums = {}
    for area in KEYED:
        items = list(keyed_items(root, area))
        if area is Area.ENTRIES:
            items += legacy_items(root)
        sums[area] = (len(items), sum(item.size for item in items))
    quarantined = list(flat_items(root, Area.QUARANTINE))
    sums[Area.QUARANTINE] = (len(quarantined), sum(item.size for item in quarantined))
    return sums


def _item(root: Root, entry: os.DirEntry[str], key: str) -> Item | None:
    try:
        facts = root.files.lstat(entry.path)
    except FileNotFoundError:
        return None
    return Item(entry.path, key, facts.st_size, facts.st_mtime_ns, facts.st_ino)


# -- what processes left -------------------------------------------------------------------------

_OLD_SECONDS = 86400.0


def leftovers(root: Root, now: float) -> list[Item]:
    """What is left in ``tmp`` by processes that died, and locks that nobody holds.

    Args:
        root: Where.
        now: Unix seconds.

    Raises:
        OSError: A directory cannot be listed.
    """
    found = []
    for item in flat_items(root, Area.TMP):
        dead = is_dead(item.key, root.host)
        # Of another host's processes only the age tells; of names that are not ours, too.
        if dead or (dead is None and now - item.modified / 1e9 > _OLD_SECONDS):
            found.append(item)
    locks = (item for item in flat_items(root, Area.LOCKS) if item.key.endswith(".lock"))
    return found + [item for item in locks if _is_free(root, item)]


def _is_free(root: Root, item: Item) -> bool:
    """Whether nobody holds a lock file, and nobody is about to."""
    if not stat.S_ISREG(root.files.lstat(item.path).st_mode):
        return False
    try:
        fd = root.files.open_write(item.path)
    except OSError:
        return False
    try:
        return try_lock(root.files, fd) is True
    finally:
        close_quietly(root.files, fd)


# -- what files name -----------------------------------------------------------------------------

# Most headers fit: one small read for each entry.
HEAD_READ = 4096

Name = tuple[str, int]


class Codec(Protocol):
    """The format, as this layer needs it. All raise ``EntryFormatError`` for bytes that they refuse."""

    def head_size(self, prefix: bytes, path: str) -> int:
        """Bytes that an entry's header ends at, from its first :data:`HEAD_READ` bytes."""

    def head(self, prefix: bytes, file_size: int, path: str) -> Sequence[Name]:
        """Digests and sizes of the blobs that an entry names, from its header alone."""

    def names(self, area: Area, data: bytes, key: str, path: str) -> Sequence[Name]:
        """What a whole file of an area names, all of it checked.

        Returns:
            Digests and sizes of the blobs of an entry or a piece; graph hashes, and no size, of a target.
        """


def read_head(files: Files, path: str, codec: Codec) -> tuple[bytes, int] | None:
    """An entry's first bytes, its whole header among them, and the file's size; all of a legacy entry.

    Raises:
        EntryFormatError: It has no header.
        OSError: It cannot be read.
    """
    try:
        fd = files.open_read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        size = files.fstat(fd).st_size
        if path.endswith(LEGACY_SUFFIXES):
            return read_exactly(files, fd, min(size, MAX_LEGACY + 1)), size
        prefix = read_exactly(files, fd, min(HEAD_READ, size))
        missing = codec.head_size(prefix, path) - len(prefix)
        if missing > 0:
            prefix += read_exactly(files, fd, missing)
    finally:
        close_quietly(files, fd)
    return prefix, size


class Reading:
    """Reads what one root's files name, and asks the layers beneath it.

    Args:
        root: Whose files are read.
        codec: The format.
        beneath: Other roots, whose entries and blobs the root's files may name.
    """

    def __init__(self, root: Root, codec: Codec, beneath: Sequence[Root] = ()) -> None:
        self.root = root
        self.codec = codec
        self._beneath = beneath

    def blobs(self, item: Item) -> Sequence[str] | None:
        """Digests of the blobs that an entry names.

        Returns:
            None of them for a damaged entry; ``None`` for one that may be good and cannot be read here.
        """
        try:
            head = read_head(self.root.files, item.path, self.codec)
            if head is None:
                return ()
            return tuple(dict.fromkeys(digest for digest, _ in self.codec.head(*head, item.path)))
        except (FutureFormatError, OSError):
            return None
        except EntryFormatError:
            return ()

    def leads_to(self, item: Item, area: Area) -> Sequence[str]:
        """What a target or a piece names; nothing for one that is left for ``verify``."""
        try:
            found = self.root.read(item.path, MAX_RECORD)
            names = () if found is None else self.codec.names(area, found.data, item.key, item.path)
        except (EntryFormatError, OSError):
            return ()
        return [name for name, _ in names]

    def entry_beneath(self, key: str) -> bool:
        """Whether a layer beneath has an entry.

        Raises:
            OSError: That cannot be told.
        """
        return any(
            self._size(path) is not None
            for root in self._beneath
            for path in (
                keyed_path(root.path, Area.ENTRIES, key),
                *(f"{root.path}/{key}{suffix}" for suffix in LEGACY_SUFFIXES),
            )
        )

    def blob_beneath(self, digest: str, size: int) -> bool:
        """Whether a layer beneath has a blob.

        Raises:
            OSError: That cannot be told.
        """
        return any(self._size(keyed_path(root.path, Area.BLOBS, digest)) == size for root in self._beneath)

    def _size(self, path: str) -> int | None:
        try:
            return self.root.files.lstat(path).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
