"""Every file-system call of the store, one method each, so that a test can fail, delay or record any of them.

Methods add nothing to the calls beneath but what every caller would have to repeat; they raise ``OSError``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

CHUNK = 1 << 20


class Files:
    """The operating system's file calls."""

    def open_read(self, path: str, *, follow: bool = False) -> int:
        """A descriptor for reading; a symbolic link is refused unless ``follow``."""
        # O_NONBLOCK: a FIFO planted under an entry's name must not hang the process.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(path, flags if follow else flags | os.O_NOFOLLOW)

    def open_write(self, path: str) -> int:
        """A descriptor of an existing file, for reading, writing and exclusive locks."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)

    def create(self, path: str, mode: int = 0o644) -> int:
        """A descriptor of a new file; ``FileExistsError`` where the name is taken."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)

    def open_or_create(self, path: str, mode: int = 0o644) -> int:
        """A descriptor of a file that is made where it is missing."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)

    def open_append(self, path: str, mode: int = 0o644) -> int:
        """A descriptor whose writes go to the file's end, whoever else writes."""
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)

    def close(self, fd: int) -> None:
        """Give a descriptor back."""
        os.close(fd)

    def read(self, fd: int, size: int) -> bytes:
        """Up to ``size`` bytes from the current position."""
        return os.read(fd, size)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        """Bytes that were taken, which may be fewer than were given."""
        return os.write(fd, data)

    def truncate(self, fd: int, size: int) -> None:
        """Cut or extend a file."""
        os.ftruncate(fd, size)

    def fsync(self, fd: int) -> None:
        """Wait until a file's bytes and size are on the disk."""
        os.fsync(fd)

    def fsync_dir(self, path: str) -> None:
        """Wait until a directory's names are on the disk."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        except OSError as error:
            # Some network and FUSE file systems know no fsync of a directory: their own rules apply.
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        finally:
            os.close(fd)

    def fstat(self, fd: int) -> os.stat_result:
        """Facts about an open file."""
        return os.fstat(fd)

    def stat(self, path: str) -> os.stat_result:
        """Facts about what a path leads to."""
        return os.stat(path)

    def lstat(self, path: str) -> os.stat_result:
        """Facts about a path itself."""
        return os.lstat(path)

    def mkdir(self, path: str, mode: int = 0o755) -> None:
        """Make a directory."""
        os.mkdir(path, mode)

    def rmdir(self, path: str) -> None:
        """Remove an empty directory."""
        os.rmdir(path)

    def rename(self, source: str, target: str) -> None:
        """Give a file another name, replacing what had it."""
        os.rename(source, target)

    def link(self, source: str, target: str) -> None:
        """Give a file a second name; ``FileExistsError`` where it is taken."""
        os.link(source, target, follow_symlinks=False)

    def unlink(self, path: str) -> None:
        """Remove a name."""
        os.unlink(path)

    def utime(self, path: str, nanoseconds: int) -> None:
        """Set a file's times."""
        os.utime(path, ns=(nanoseconds, nanoseconds), follow_symlinks=False)

    def scan(self, path: str) -> list[os.DirEntry[str]]:
        """A directory's entries."""
        with os.scandir(path) as entries:
            return list(entries)

    def flock(self, fd: int, operation: int) -> None:
        """``fcntl.flock``."""
        fcntl.flock(fd, operation)

    def lock(self, fd: int) -> bool:
        """Take an exclusive lock without waiting; whether it was had."""
        # Imported here, for warm starts take no exclusive locks.
        from filelock import lock_descriptor

        return lock_descriptor(fd, blocking=False)

    def unlock(self, fd: int) -> None:
        """Give an exclusive lock back."""
        from filelock import unlock_descriptor

        unlock_descriptor(fd)

    def statvfs(self, path: str) -> os.statvfs_result:
        """Facts about a file system."""
        return os.statvfs(path)


@contextmanager
def opened(files: Files, fd: int) -> Iterator[int]:
    """Close a descriptor at the end, and let no failure of that hide an earlier one."""
    try:
        yield fd
    except BaseException:
        close_quietly(files, fd)
        raise
    else:
        files.close(fd)


def close_quietly(files: Files, fd: int) -> None:
    """Close a descriptor that only was read; nothing can be lost by a failure."""
    try:
        files.close(fd)
    except OSError:
        pass


def read_exactly(files: Files, fd: int, size: int) -> bytes:
    """Up to ``size`` bytes; fewer only at the file's end."""
    first = files.read(fd, size)
    if len(first) == size or not first:
        return first
    parts, left = [first], size - len(first)
    while left > 0:
        part = files.read(fd, min(left, CHUNK))
        if not part:
            break
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def write_all(files: Files, fd: int, data: bytes) -> None:
    """Write every byte, however few the system takes at a time."""
    view = memoryview(data)
    while view:
        view = view[files.write(fd, view) :]


def is_file(result: os.stat_result) -> bool:
    """Whether facts are about a regular file."""
    return stat.S_ISREG(result.st_mode)


def is_dir(result: os.stat_result) -> bool:
    """Whether facts are about a directory."""
    return stat.S_ISDIR(result.st_mode)
