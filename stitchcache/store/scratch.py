"""Temporary directories of the store, and whether it can be written at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from stitchcache.errors import StoreWriteError
from stitchcache.store.files import opened, write_all
from stitchcache.store.layout import Area
from stitchcache.store.names import temporary_name
from stitchcache.store.root import Root

_ROOM = 512 << 20
_FILES = 4096


@contextmanager
def scratch(root: Root) -> Iterator[str]:
    """A private temporary directory: in the root where that has room, else in the system's."""
    path = _make(root)
    try:
        yield path
    finally:
        # Imported here, for warm starts need neither.
        import shutil

        shutil.rmtree(path, ignore_errors=True)


def _make(root: Root) -> str:
    if not root.read_only and _has_room(root):
        path = os.path.join(root.area(Area.TMP), temporary_name(root.host, "scratch"))
        try:
            root.make_dir(root.area(Area.TMP))
            root.files.mkdir(path, 0o700)
        except OSError:
            pass
        else:
            return path
    import tempfile

    return tempfile.mkdtemp(prefix="stitchcache-")


def _has_room(root: Root) -> bool:
    """Whether what a compiler leaves on its way fits: a full cache must not keep it from working."""
    place = root.path
    while not os.path.isdir(place) and os.path.dirname(place) != place:
        place = os.path.dirname(place)
    try:
        facts = root.files.statvfs(place)
    except OSError:
        return False
    return facts.f_bavail * facts.f_frsize >= _ROOM and (facts.f_files == 0 or facts.f_favail >= _FILES)


def why_not_writable(root: Root) -> str | None:
    """Why nothing can be stored; ``None`` when it can. Tries it."""
    try:
        with root.writing(root.path):
            probe, fd = root.create_temp()
            try:
                with opened(root.files, fd):
                    write_all(root.files, fd, b"x")
            finally:
                root.discard(probe)
    except StoreWriteError as error:
        return error.message
    return None
