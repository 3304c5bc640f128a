"""Locks between processes: exclusive by key around compiling, shared to keep a file from eviction.

Exclusive locks are filelock's, taken on descriptors that are ours (``lock_descriptor``, since 3.30): its
``FileLock`` opens and closes the file by itself, out of reach of :class:`~stitchcache.store.files.Files`,
leaves it there when it lets go, and where ``flock`` is missing takes a lock that outlives its holder.

Shared locks are plain ``flock``, which is what filelock's native locks are, so the two exclude each other.
filelock's own ``ReadWriteLock`` is a transaction on an SQLite file: it would need one beside every blob, and
what eviction has to see is a lock on the blob itself.

The kernel frees these locks when their holder dies, and Linux maps them to byte-range locks on NFS. A file
under a lock is removed only by the lock's holder, and whoever gets a lock checks that the file still has its
name.

Names of temporary files tell who made them, so that what the dead left is told from the work of the living.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stitchcache.errors import LockTimeoutError
from stitchcache.store.files import Files, close_quietly, read_exactly, write_all

_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1
_BUSY = frozenset({errno.EWOULDBLOCK, errno.EAGAIN})


def try_lock(files: Files, fd: int, *, shared: bool = False) -> bool | None:
    """Take a lock without waiting.

    Returns:
        Whether it was had; ``None`` where locks do not work.
    """
    try:
        if not shared and files.lock(fd):
            return True
        # filelock takes EACCES for another's lock; where it means that locking is forbidden, waiting would
        # never end. So the kernel is asked once more, and says which it is.
        files.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _BUSY else None
    return True


def same_file(files: Files, fd: int, path: str) -> bool:
    """Whether a path still leads to an open file.

    Raises:
        OSError: That cannot be told.
    """
    try:
        named = files.lstat(path)
    except FileNotFoundError:
        return False
    held = files.fstat(fd)
    return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)


@contextmanager
def exclusive(
    files: Files,
    path: str,
    *,
    timeout: float | None = None,
    on_wait: Callable[[float, str], None] | None = None,
) -> Iterator[bool]:
    """Hold a lock file exclusively.

    Args:
        files: File-system calls.
        path: The lock file; its directory must exist.
        timeout: Seconds to wait; ``None`` waits for ever, 0 does not wait.
        on_wait: Called now and then while waiting, with the seconds waited and who holds the lock.

    Yields:
        True when held; False where locks do not work, and the caller goes on without.

    Raises:
        LockTimeoutError: Another held it for all that time.
    """
    fd = _acquire(files, path, timeout, on_wait)
    if fd is None:
        yield False
        return
    try:
        yield True
    finally:
        _let_go(files, path, fd)


def _let_go(files: Files, path: str, fd: int) -> None:
    try:
        # Removed while held: a waiter that gets the nameless file's lock notices and starts over.
        files.unlink(path)
    except OSError:
        pass
    try:
        # Closing would not do where a child that was forked meanwhile has the descriptor too.
        files.unlock(fd)
    except OSError:
        pass
    close_quietly(files, fd)


def _acquire(
    files: Files, path: str, timeout: float | None, on_wait: Callable[[float, str], None] | None
) -> int | None:
    start: float | None = None
    pause = _FIRST_PAUSE
    while True:
        try:
            fd = files.open_or_create(path)
        except OSError:
            return None
        try:
            had = try_lock(files, fd)
            if had and same_file(files, fd, path):
                _sign(files, fd)
                return fd
        except OSError:
            # As good as no locks.
            close_quietly(files, fd)
            return None
        if had is None:
            close_quietly(files, fd)
            return None
        holder = "" if had else _holder(files, fd)
        close_quietly(files, fd)
        if had:
            continue
        # From the first refusal on: before it, filelock may have had to be imported.
        start = time.monotonic() if start is None else start
        waited = time.monotonic() - start
        if timeout is not None and waited >= timeout:
            raise LockTimeoutError(
                f"{path}: still held after {waited:.1f} s by {holder or 'another process'}; wait longer, "
                "or stop that process (a lock is freed when its holder ends)",
                path=path,
                seconds=waited,
            )
        if on_wait is not None:
            on_wait(waited, holder)
        left = pause if timeout is None else min(pause, timeout - waited)
        time.sleep(max(left, 0.0))
        pause = min(pause * 1.5, _LONGEST_PAUSE)


def _sign(files: Files, fd: int) -> None:
    # For messages only; a full disk must not stop anyone from compiling.
    try:
        files.truncate(fd, 0)
        write_all(files, fd, f"process {os.getpid()} on {os.uname().nodename}\n".encode())
    except OSError:
        pass


def _holder(files: Files, fd: int) -> str:
    try:
        return read_exactly(files, fd, 256).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def hold_shared(files: Files, path: str) -> int | None:
    """Keep a file from being evicted for as long as the returned descriptor is open.

    Args:
        files: File-system calls.
        path: An existing file.

    Returns:
        A descriptor, or ``None`` where the file is gone. Where locks do not work the descriptor protects
        nothing, and the grace period has to.
    """
    while True:
        try:
            fd = files.open_read(path)
        except FileNotFoundError:
            return None
        try:
            # Eviction holds its exclusive lock for one unlink, so waiting is short.
            try:
                files.flock(fd, fcntl.LOCK_SH)
            except OSError:
                return fd
            if same_file(files, fd, path):
                return fd
        except BaseException:
            close_quietly(files, fd)
            raise
        close_quietly(files, fd)


# -- names of temporary files --------------------------------------------------------------------

_NAME = re.compile(r"(?P<host>[A-Za-z0-9_-]+)\.(?P<pid>[0-9]+)\.[0-9a-f]{16}\.(?P<what>[a-z]+)")


def host_token() -> str:
    """This host, boot and process namespace: where a process number means the same process."""
    node = os.uname().nodename
    digest = hashlib.sha256(node.encode())
    # Containers on one host, and hosts cloned with one name, number their processes separately.
    for source in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            if source.endswith("pid"):
                digest.update(os.readlink(source).encode())
            else:
                with open(source, "rb") as file:
                    digest.update(file.read(64))
        except OSError:
            digest.update(b"?")
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", node)[:32] or "host"
    return f"{readable}-{digest.hexdigest()[:12]}"


def temporary_name(host: str, what: str) -> str:
    """A name that no other process or thread makes."""
    return f"{host}.{os.getpid()}.{os.urandom(8).hex()}.{what}"


def is_dead(name: str, host: str) -> bool | None:
    """Whether the maker of a temporary name is gone.

    Returns:
        ``None`` where it cannot be told: another host, or a name that is not ours.
    """
    match = _NAME.fullmatch(name)
    if match is None or match["host"] != host:
        return None
    try:
        os.kill(int(match["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False
