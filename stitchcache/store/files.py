"""Every file-system call of the store, one method each, so that a test can fail, delay or record any of them.

Methods add nothing to the calls beneath but what every caller would have to repeat; they raise ``OSError``.
Below them stands what a failed call means for the user, and whose files are trusted.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from stitchcache.errors import StoreWriteError

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


# -- failures ------------------------------------------------------------------------------------

_ELSEWHERE = "or set STITCHCACHE_DIR to another directory"
_ADVICE = {
    errno.ENOSPC: f"the disk is full: free space (`stitchcache prune`), {_ELSEWHERE}",
    errno.EDQUOT: f"the quota is used up: free space (`stitchcache prune`), {_ELSEWHERE}",
    errno.EROFS: f"the file system is read-only: use it as a lower layer, {_ELSEWHERE}",
    errno.EACCES: f"permission is denied: check who owns it, {_ELSEWHERE}",
    errno.EPERM: f"permission is denied: check who owns it, {_ELSEWHERE}",
    errno.EMFILE: "this process has too many open files: raise `ulimit -n`",
    errno.ENFILE: "the system has too many open files: raise fs.file-max",
    errno.ENOTDIR: f"a file stands where a directory should be: move it away, {_ELSEWHERE}",
    errno.ESTALE: f"the network file system lost the file: try again, {_ELSEWHERE}",
    errno.EIO: f"the device reports an error: look at the system's log, {_ELSEWHERE}",
}


def words(error: OSError) -> str:
    """The operating system's words for an error."""
    return os.strerror(error.errno) if error.errno else str(error)


def write_error(error: OSError, path: str) -> StoreWriteError:
    """The store's error for a write that failed.

    Args:
        error: What the system said.
        path: What was to be written, where the error does not say.
    """
    where = error.filename if isinstance(error.filename, str) else path
    advice = _ADVICE.get(error.errno or 0, "`stitchcache doctor` tries what the directory can do")
    return StoreWriteError(
        f"{where}: cannot be written ({words(error)}): {advice}", path=where, reason=words(error)
    )


# -- trust ---------------------------------------------------------------------------------------
# What an entry holds is code: a file that others can write is as good as theirs.

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def distrust(path: str, facts: os.stat_result) -> str | None:
    """Why a file or directory is not trusted; ``None`` when it is.

    Args:
        path: What it is about, for the message.
        facts: Its ``stat``.
    """
    # Ownership by root is no weaker: root can do anything to the process anyway.
    if facts.st_uid not in (os.geteuid(), 0):
        return (
            f"{path} belongs to user {facts.st_uid}, and this process runs as {os.geteuid()}: "
            "whoever owns it could run code here; copy the cache, or chown it"
        )
    if facts.st_mode & _OTHERS_WRITE:
        mode = stat.S_IMODE(facts.st_mode)
        return (
            f"{path} has mode {mode:04o}, so that others can write it and run code here: "
            f"chmod go-w {path!r} after checking who did"
        )
    return None
