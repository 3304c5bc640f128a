"""Temporary files whose makers are gone."""

from __future__ import annotations

import stat

from stitchcache.store.files import close_quietly
from stitchcache.store.layout import Area
from stitchcache.store.locks import try_lock
from stitchcache.store.names import is_dead
from stitchcache.store.root import Root
from stitchcache.store.scan import Item, flat_items

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
