"""The store's file-system calls, and what is made of their answers: shared locks, errors, trust.

All calls go through :class:`Calls`, so that a test can fail, delay or record any of them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from stitchcache.errors import StoreWriteError


class Calls:
    """The operating system's calls. They raise ``OSError``."""

    close = staticmethod(os.close)
    read = staticmethod(os.read)
    write = staticmethod(os.write)
    fsync = staticmethod(os.fsync)
    fstat = staticmethod(os.fstat)
    stat = staticmethod(os.stat)
    lstat = staticmethod(os.lstat)
    rmdir = staticmethod(os.rmdir)
    rename = staticmethod(os.rename)
    unlink = staticmethod(os.unlink)
    statvfs = staticmethod(os.statvfs)
    flock = staticmethod(fcntl.flock)

    def open_read(self, path: str, *, follow: bool = False) -> int:
        """Open for reading; a symbolic link is refused unless ``follow``."""
        # O_NONBLOCK: a FIFO planted under an entry's name must not hang the process.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(path, flags if follow else flags | os.O_NOFOLLOW)

    def open_write(self, path: str) -> int:
        """Open an existing file for reading, writing and exclusive locks."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)

    def create(self, path: str, mode: int = 0o644) -> int:
        """Open a new file; ``FileExistsError`` where the name is taken."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)

    def open_or_create(self, path: str, mode: int = 0o644) -> int:
        """Open a file that is made where it is missing."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)

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

    def mkdir(self, path: str, mode: int = 0o755) -> None:
        """Make a directory that only its owner can write, whatever the umask."""
        os.mkdir(path, mode)

    def link(self, source: str, target: str) -> None:
        """Give a file a second name; ``FileExistsError`` where it is taken."""
        os.link(source, target, follow_symlinks=False)

    def utime(self, path: str, nanoseconds: int) -> None:
        """Set a file's times."""
        os.utime(path, ns=(nanoseconds, nanoseconds), follow_symlinks=False)

    def scan(self, path: str) -> list[os.DirEntry[str]]:
        """List a directory."""
        with os.scandir(path) as entries:
            return list(entries)

    def lock(self, fd: int) -> bool:
        """Take an exclusive lock without waiting; whether it was had."""
        # Imported here, for warm starts take no exclusive locks.
        from filelock import lock_descriptor

        return lock_descriptor(fd, blocking=False)


class Files(Calls):
    """The calls, and what is made of them."""

    def close_quietly(self, fd: int) -> None:
        """Close a descriptor where a failure of that loses nothing."""
        with suppress(OSError):
            self.close(fd)

    @contextmanager
    def opened(self, fd: int) -> Iterator[int]:
        """Close a descriptor at the end of the block, quietly."""
        try:
            yield fd
        finally:
            self.close_quietly(fd)

    def read_exactly(self, fd: int, size: int) -> bytes:
        """Up to ``size`` bytes; fewer only at the file's end."""
        parts = []
        while size > 0 and (part := self.read(fd, size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def write_all(self, fd: int, data: bytes) -> None:
        """Write every byte, however few the system takes at a time."""
        view = memoryview(data)
        while view:
            view = view[self.write(fd, view) :]

    # Locks are plain flock, and filelock's native ones, which are flock too: the two exclude each other. The
    # kernel frees them when their holder dies, and Linux maps them to byte-range locks on NFS. A file under a
    # lock is removed only by the lock's holder, and whoever gets a lock checks that the file has its name.

    def try_lock(self, fd: int, *, plain: bool = False) -> bool | None:
        """Take an exclusive lock without waiting: whether it was had; ``None`` where locks do not work."""
        try:
            # filelock takes a while to import: what every process does is done without it.
            if not plain and self.lock(fd):
                return True
            # filelock takes EACCES for another's lock; where it means that locking is forbidden, waiting
            # would never end. So the kernel is asked once more, and says which it is.
            self.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return False if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN) else None
        return True

    def same_file(self, fd: int, path: str) -> bool:
        """Whether a path still leads to an open file."""
        try:
            named = self.lstat(path)
        except FileNotFoundError:
            return False
        held = self.fstat(fd)
        return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)

    def lock_shared(self, fd: int, path: str) -> bool:
        """Keep an open file from being evicted for as long as it is open; whether it still has its name."""
        try:
            # Eviction holds its exclusive lock for one unlink, so waiting is short.
            self.flock(fd, fcntl.LOCK_SH)
        except OSError:
            # Where locks do not work, the grace period has to protect the file.
            return True
        return self.same_file(fd, path)

    def hold_shared(self, path: str) -> int | None:
        """Open a file under a shared lock; ``None`` where it is gone."""
        while True:
            try:
                fd = self.open_read(path)
            except FileNotFoundError:
                return None
            try:
                if self.lock_shared(fd, path):
                    return fd
            except BaseException:
                self.close_quietly(fd)
                raise
            self.close_quietly(fd)


# -- failures ------------------------------------------------------------------------------------

_ELSEWHERE = "or set STITCHCACHE_DIR to another directory"
_ADVICE = {
    errno.ENOSPC: f"the disk is full: free space (`stitchcache prune`), {_ELSEWHERE}",
    errno.EDQUOT: f"the quota is used up: free space (`stitchcache prune`), {_ELSEWHERE}",
    errno.EROFS: f"the file system is read-only: use it as a lower layer, {_ELSEWHERE}",
    errno.EACCES: f"permission is denied: check who owns it, {_ELSEWHERE}",
    errno.EPERM: f"it is not permitted: check who owns it, {_ELSEWHERE}",
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
    """The store's error for a write that failed; ``path`` is named where the error names none."""
    where = error.filename if isinstance(error.filename, str) else path
    advice = _ADVICE.get(error.errno or 0, "`stitchcache doctor` tries what the directory can do")
    return StoreWriteError(
        f"{where}: cannot be written ({words(error)}): {advice}", path=where, reason=words(error)
    )


# -- trust ---------------------------------------------------------------------------------------

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def distrust(path: str, facts: os.stat_result) -> str | None:
    """Why a file or directory is not trusted; ``None`` when it is.

    What an entry holds is code: a file that others can write is as good as theirs.
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
