"""Taking damaged files out of the way without losing the evidence, or a good file that came in between."""

from __future__ import annotations

import os

from stitchcache.store.files import opened, write_all
from stitchcache.store.layout import Area
from stitchcache.store.root import Identity, Root

MAX_FILES = 64
MAX_BYTES = 256 << 20
NOTE = ".reason"


def quarantine(root: Root, path: str, identity: Identity | None, reason: str) -> bool:
    """Move a damaged file aside, with a note saying why.

    Args:
        root: Whose it is.
        path: The file.
        identity: Which file was found damaged; one that took its place since is left alone.
        reason: What is wrong with it.

    Returns:
        Whether the name is free now, or has a newer file.
    """
    if root.read_only:
        return False
    aside = os.path.join(root.area(Area.QUARANTINE), f"{os.path.basename(path)}.{os.urandom(4).hex()}")
    try:
        root.make_dir(root.area(Area.QUARANTINE))
        root.files.rename(path, aside)
        if identity is not None and root.files.lstat(aside).st_ino != identity[1]:
            _put_back(root, aside, path)
            return True
    except FileNotFoundError:
        return True
    except OSError:
        return False
    _write_note(root, aside + NOTE, path, reason)
    cap(root)
    return True


def _put_back(root: Root, aside: str, path: str) -> None:
    """Undo: a good one was published in between; but there may be a newer one still."""
    try:
        root.files.link(aside, path)
    except FileExistsError:
        pass
    root.discard(aside)


def _write_note(root: Root, name: str, path: str, reason: str) -> None:
    text = f"{os.path.relpath(path, root.path)}\n{reason}\n".encode("utf-8", "backslashreplace")
    try:
        with opened(root.files, root.files.create(name)) as fd:
            write_all(root.files, fd, text)
    except OSError:
        # The file itself is aside, which is what matters; a full disk may leave no room for the note.
        pass


def excess(root: Root, max_files: int = MAX_FILES, max_bytes: int = MAX_BYTES) -> list[tuple[str, int]]:
    """The oldest quarantined files beyond a number and a size, with their sizes.

    Raises:
        OSError: The quarantine cannot be listed.
    """
    found = []
    for item in root.scan(root.area(Area.QUARANTINE)):
        try:
            facts = root.files.lstat(item.path)
        except FileNotFoundError:
            continue
        found.append((facts.st_ctime_ns, item.path, facts.st_size))
    found.sort(reverse=True)
    surplus, total, count = [], 0, 0
    for _, path, size in found:
        total += size
        count += not path.endswith(NOTE)
        if count > max_files or total > max_bytes:
            surplus.append((path, size))
    return surplus


def cap(root: Root) -> None:
    """Keep the quarantine from growing without end."""
    try:
        for path, _ in excess(root):
            root.discard(path)
    except OSError:
        pass
