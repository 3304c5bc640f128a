"""What lies in a root: one look at every directory, for statistics, eviction and verification."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from stitchcache.store.layout import KEYED, LEGACY_SUFFIXES, Area, is_key, key_of
from stitchcache.store.root import Root


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
        if suffix in LEGACY_SUFFIXES and is_key(stem):
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
