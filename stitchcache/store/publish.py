"""Putting files in place, durably and atomically, and keeping blobs until an entry names them.

Publishing a file::

    create tmp/<host>.<pid>.<random>.part exclusively, write, fsync          (errors: nothing happened)
    rename over the name (entries, pointers) or link without replacing (blobs)
    fsync the directory                                                      (now it is acknowledged)

so that a reader sees a whole file or none, and what was acknowledged survives a crash.

A blob that was put is held by a shared lock on it (see ``locks``) until the entry that names it is put; the
lock dies with the process. Eviction removes a blob only under an exclusive lock on it, and only if its times
are those that the scan saw; whoever publishes an entry renews the times of its blobs afterwards. So no order
of events lets eviction remove a blob of an entry that it did not see.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from stitchcache.errors import StoreWriteError
from stitchcache.store.files import CHUNK, Files, close_quietly, opened, words, write_all
from stitchcache.store.layout import Area, keyed_path
from stitchcache.store.locks import hold_shared, temporary_name, try_lock
from stitchcache.store.root import Root

# Where the file system knows no hard links, or no more of them; ENOENT is a directory to be made.
_NO_LINK = frozenset(
    {
        errno.EPERM,
        errno.EACCES,
        errno.EOPNOTSUPP,
        errno.ENOTSUP,
        errno.ENOSYS,
        errno.EMLINK,
        errno.EXDEV,
        errno.ENOENT,
    }
)
_HELD_AT_MOST = 512


class Holds:
    """Open descriptors whose shared locks keep blobs from being evicted.

    Args:
        files: File-system calls.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._mutex = threading.Lock()
        self._held: dict[str, int] = {}

    def __contains__(self, digest: str) -> bool:
        with self._mutex:
            return digest in self._held

    def __del__(self) -> None:
        self.release(list(self._held))

    def keep(self, digest: str, fd: int) -> None:
        """Hold a blob through a descriptor that has its lock."""
        with self._mutex:
            surplus = [self._held.pop(digest, None)]
            self._held[digest] = fd
            if len(self._held) > _HELD_AT_MOST:
                # Descriptors are scarce; the grace period is left to protect the oldest.
                surplus.append(self._held.pop(next(iter(self._held))))
        for each in surplus:
            if each is not None:
                close_quietly(self._files, each)

    def release(self, digests: Iterable[str]) -> None:
        """Let go of blobs: an entry names them now, or nobody will."""
        for digest in digests:
            with self._mutex:
                fd = self._held.pop(digest, None)
            if fd is not None:
                close_quietly(self._files, fd)


def publish(root: Root, area: Area, key: str, data: bytes) -> str:
    """Put a file in place, replacing what had its name.

    Returns:
        Its path.

    Raises:
        StoreWriteError: It cannot be written; nothing changed, or it is not known whether it will last.
    """
    target = keyed_path(root.path, area, key)
    with root.writing(target):
        root.make_dir(os.path.dirname(target))
        temp, fd = root.create_temp()
        try:
            with opened(root.files, fd):
                write_all(root.files, fd, data)
                root.sync(fd)
            root.rename(temp, target)
        except BaseException:
            root.discard(temp)
            raise
        root.sync_dir(os.path.dirname(target))
    return target


def publish_blob(root: Root, holds: Holds, source: bytes | str) -> tuple[str, int]:
    """Put a blob in place under its digest, and hold it.

    Args:
        root: Where.
        holds: What will hold it.
        source: The bytes, or the path of a file that has them.

    Returns:
        Digest and size.

    Raises:
        StoreWriteError: It cannot be written, or ``source`` cannot be read.
    """
    with root.writing(root.area(Area.BLOBS)):
        temp, fd = root.create_temp()
        try:
            digest, size = _fill(root, fd, source)
            kept = _place(root, holds, temp, fd, digest, size)
        except BaseException:
            close_quietly(root.files, fd)
            root.discard(temp)
            raise
        if not kept:
            close_quietly(root.files, fd)
    return digest, size


def _fill(root: Root, fd: int, source: bytes | str) -> tuple[str, int]:
    if isinstance(source, bytes):
        write_all(root.files, fd, source)
        return hashlib.sha256(source).hexdigest(), len(source)
    digest, size = hashlib.sha256(), 0
    try:
        reader = root.files.open_read(source, follow=True)
    except OSError as error:
        raise StoreWriteError(
            f"{source}: cannot be read ({words(error)}), so it is not stored",
            path=source,
            reason=words(error),
        ) from error
    try:
        while chunk := root.files.read(reader, CHUNK):
            digest.update(chunk)
            size += len(chunk)
            write_all(root.files, fd, chunk)
    finally:
        close_quietly(root.files, reader)
    return digest.hexdigest(), size


def _place(root: Root, holds: Holds, temp: str, fd: int, digest: str, size: int) -> bool:
    """Give a filled temporary file its name; whether ``fd`` is kept as the hold."""
    target = keyed_path(root.path, Area.BLOBS, digest)
    shard = os.path.dirname(target)
    root.make_dir(shard)
    if _adopt(root, holds, target, digest, size):
        root.discard(temp)
        return False
    root.sync(fd)
    # Held before it has a name, so that no eviction comes in between.
    try_lock(root.files, fd, shared=True)
    try:
        root.files.link(temp, target)
    except FileExistsError:
        # Somebody was faster; or a damaged one is in the way, and then this one replaces it.
        if _adopt(root, holds, target, digest, size):
            root.discard(temp)
            return False
        root.rename(temp, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        root.rename(temp, target)
    else:
        root.discard(temp)
    root.sync_dir(shard)
    holds.keep(digest, fd)
    return True


def _adopt(root: Root, holds: Holds, target: str, digest: str, size: int, *, by_size: bool = False) -> bool:
    """Use the blob that is already there, if it is good; ``by_size`` looks at its size alone."""
    fd = hold_shared(root.files, target)
    if fd is None:
        return False
    try:
        facts = root.files.fstat(fd)
        good = facts.st_size == size and (by_size or root.blob_problem(fd, facts, digest, size) is None)
        if good:
            root.touch(target)
            # Its writer may have died before it came to these, or not have come to them yet.
            root.sync(fd)
            root.sync_dir(os.path.dirname(target))
    except BaseException:
        close_quietly(root.files, fd)
        raise
    if good:
        holds.keep(digest, fd)
    else:
        close_quietly(root.files, fd)
    return good


def hold_blob(root: Root, holds: Holds, digest: str, size: int) -> bool:
    """Keep a blob that is there until it is released. Its size is checked, its digest is not.

    Returns:
        Whether there is one.

    Raises:
        OSError: It cannot be opened.
    """
    path = keyed_path(root.path, Area.BLOBS, digest)
    if digest in holds:
        # Eviction cannot have taken it, but a reader that found it damaged can.
        try:
            return root.files.lstat(path).st_size == size
        except FileNotFoundError:
            holds.release([digest])
            return False
    return _adopt(root, holds, path, digest, size, by_size=True)


# -- whether there is room -----------------------------------------------------------------------

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
