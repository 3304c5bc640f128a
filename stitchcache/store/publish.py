"""What only writing needs: blobs, the lock around compiling, scratch directories, the quarantine.

A blob that was put is held by a shared lock until the entry that names it is put; the lock dies with the
process. Eviction removes a blob only under an exclusive lock, and only if its times are those that it saw;
whoever publishes an entry renews the times of its blobs afterwards. So no order of events lets eviction
remove a blob of an entry that it did not see.

No lock is on a file that others than its owner can open: whoever can only read a cache can stop nobody.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from stitchcache.errors import EntryDamagedError, LockTimeoutError, StoreWriteError
from stitchcache.store import Area, Files, distrust, distrusted_way, keyed_path, words
from stitchcache.store.root import Item, OnWait, Root
from stitchcache.types import BlobRef

if TYPE_CHECKING:
    from pathlib import Path

_CHUNK = 1 << 20


def publish_blob(
    root: Root, source: bytes | str | Iterable[bytes], expected: BlobRef | None = None
) -> BlobRef:
    """Put a blob in place under its digest, and hold it.

    ``source`` is its bytes, in one or in several parts, or the path of a file that has them. If another blob
    was ``expected``, an ``EntryDamagedError`` is raised, and nothing is put in place.
    """
    with root.writing(root.area(Area.BLOBS)), root.temporary() as (temp, fd):
        found, size = hashlib.sha256(), 0
        for chunk in _chunks(root.files, source):
            found.update(chunk)
            size += len(chunk)
            root.files.write_all(fd, chunk)
        ref = BlobRef(digest=found.hexdigest(), size=size)
        if expected not in (None, ref):
            raise EntryDamagedError.at("", "blob", f"sha256 {ref.digest} of {size} bytes")
        target = keyed_path(root.path, Area.BLOBS, ref.digest)
        root.make_dir(os.path.dirname(target))
        root.sync(fd)
        # Before it has its name, so that no prune comes in between.
        root.keep(ref.digest)
        if not _is_good(root, target, ref, read=True):
            # Where another process is as far, the same bytes take the place of its blob.
            root.rename(temp, target)
            root.sync_dir(os.path.dirname(target))
    return ref


def _chunks(files: Files, source: bytes | str | Iterable[bytes]) -> Iterator[bytes]:
    if not isinstance(source, str):
        yield from [source] if isinstance(source, bytes) else source
        return
    try:
        reader = files.open_read(source, follow=True)
    except OSError as error:
        message = f"{source}: cannot be read ({words(error)}), so it is not stored"
        raise StoreWriteError(message, path=source, reason=words(error)) from error
    with files.opened(reader):
        yield from iter(lambda: files.read(reader, _CHUNK), b"")


def hold_blob(root: Root, ref: BlobRef) -> bool:
    """Keep a blob until it is released; whether it is there. Its size is checked, its digest is not."""
    kept = root.holds(ref.digest)
    if not kept and root.has_blob(ref):
        # Locked first and looked at then: what is there under the lock stays.
        root.keep(ref.digest)
    # Eviction cannot have taken what is kept, but a reader that found it damaged can.
    path = keyed_path(root.path, Area.BLOBS, ref.digest)
    there = root.has_blob(ref) if kept else _is_good(root, path, ref, read=False)
    if not there:
        root.release([ref.digest])
    return there


def _is_good(root: Root, path: str, ref: BlobRef, *, read: bool) -> bool:
    """Whether a blob is there already and will last; ``read`` is whether its digest is asked too."""
    fd = root.open(path)
    if fd is None:
        return False
    with root.files.opened(fd):
        facts = root.files.fstat(fd)
        # One that nobody may load is replaced.
        if facts.st_size != ref.size or distrust(path, facts) or (read and root.blob_problem(fd, ref)):
            return False
        root.touch(path)
        # Its writer may have died before it came to these, or not have come to them yet.
        root.sync(fd)
        root.sync_dir(os.path.dirname(path))
    return True


# -- exclusive locks -----------------------------------------------------------------------------
# On descriptors that are ours: filelock's ``FileLock`` opens and closes the file by itself, leaves it there
# when it lets go, and where ``flock`` is missing takes a lock that outlives its holder.

_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1


@contextmanager
def exclusive(
    root: Root, name: str, *, timeout: float | None, on_wait: OnWait | None = None
) -> Iterator[bool]:
    """Hold a lock file of a root, as :meth:`stitchcache.Cache.lock` tells."""
    path = os.path.join(root.area(Area.LOCKS), f"{name}.lock")
    fd = None if root.read_only else _acquire(root, path, timeout, on_wait)
    if fd is None:
        yield False
        return
    try:
        yield True
    finally:
        # Removed while held: a waiter that gets the nameless file's lock notices and starts over.
        root.discard(path)
        with suppress(OSError):
            # Closing would not do where a child that was forked meanwhile has the descriptor too.
            root.files.flock(fd, fcntl.LOCK_UN)
        root.files.close_quietly(fd)


def _acquire(root: Root, path: str, timeout: float | None, on_wait: OnWait | None) -> int | None:
    files = root.files
    start: float | None = None
    pause, replaced = _FIRST_PAUSE, False
    while True:
        try:
            root.make_dir(os.path.dirname(path))
            if root.trust == "signed" and distrust(os.path.dirname(path), files.lstat(os.path.dirname(path))):
                # Somebody else could hold the lock for ever.
                return None
            fd = files.open_or_create(path)
        except OSError:
            return None
        holder = ""
        try:
            if not replaced and stat.S_IMODE(files.fstat(fd).st_mode) & 0o077:
                # Of an older version: others could open it, and hold its lock for as long as they like. Done
                # once, for some file systems know no modes.
                replaced = True
                files.unlink(path)
                files.close_quietly(fd)
                continue
            had = files.try_lock(fd)
            if had and files.same_file(fd, path):
                # Who it is, for messages; a full disk must not stop anyone from compiling.
                with suppress(OSError):
                    files.write_all(fd, f"process {os.getpid()} on {os.uname().nodename}\n".encode())
                return fd
            if had is False:
                holder = files.read_exactly(fd, 256).partition(b"\n")[0].decode("utf-8", "replace")
        except OSError:
            # As good as no locks.
            had = None
        files.close_quietly(fd)
        if had is None:
            return None
        if had:
            continue
        # From the first refusal on: before it, filelock may have had to be imported.
        start = time.monotonic() if start is None else start
        waited = time.monotonic() - start
        if timeout is not None and waited >= timeout:
            message = (
                f"{path}: still held after {waited:.1f} s by {holder or 'another process'}; wait longer, "
                "or stop that process (a lock is freed when its holder ends)"
            )
            raise LockTimeoutError(message, path=path, seconds=waited)
        if on_wait is not None:
            on_wait(waited, holder)
        time.sleep(pause if timeout is None else min(pause, timeout - waited))
        pause = min(pause * 1.5, _LONGEST_PAUSE)


_ROOM = 512 << 20
_FILES = 4096


@contextmanager
def scratch(root: Root) -> Iterator[Path]:
    """A private temporary directory: in the root where that has room and is trusted, else in the system's.

    Raises:
        StoreWriteError: Others could put what they like in place of either.
    """
    # Not at the top: they import a dozen modules, and only what compiles needs them.
    import shutil
    import tempfile
    from pathlib import Path

    within = None if root.read_only else _scratch_within(root)
    path, fd = within or (tempfile.mkdtemp(prefix="stitchcache-"), None)
    try:
        if within is None and (reason := distrusted_way(path)):
            message = f"{reason}; or set TMPDIR to a directory of your own, to compile in"
            raise StoreWriteError(message, path=path, reason="not trusted")
        yield Path(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if fd is not None:
            root.files.close_quietly(fd)


def _scratch_within(root: Root) -> tuple[str, int] | None:
    """Path and lock of a new directory; ``None`` where what a compiler leaves on its way may not fit."""
    path = root.temporary_path("scratch")
    try:
        root.make_dir(os.path.dirname(path))
        # Asked each time: what is compiled here is run.
        root.require_own(os.path.dirname(path))
        facts = root.files.statvfs(os.path.dirname(path))
        # Some file systems have no fixed number of files and say 0.
        if facts.f_bavail * facts.f_frsize < _ROOM or (facts.f_files and facts.f_favail < _FILES):
            return None
        root.files.mkdir(path, 0o700)
        # As with other temporary files: what has no lock was left by a process that died.
        fd = root.files.open_read(path)
        root.files.lock_shared(fd, path)
    except OSError:
        return None
    return path, fd


# -- quarantine ----------------------------------------------------------------------------------
# A damaged file is moved, so that the evidence is kept and a good file that came in between is not lost.

MAX_FILES = 64
MAX_BYTES = 256 << 20
_NOTE = ".reason"


def quarantine(root: Root, path: str, inode: int | None, reason: str) -> bool:
    """Move a damaged file aside, with a note saying why; whether the name is free now, or has a newer file.

    ``inode`` tells which file was found damaged: one that took its place since is left alone.
    """
    if root.read_only:
        return False
    files, directory = root.files, root.area(Area.QUARANTINE)
    aside = os.path.join(directory, f"{os.path.basename(path)}.{os.urandom(4).hex()}")
    try:
        root.make_dir(directory)
        files.rename(path, aside)
        if inode is not None and files.lstat(aside).st_ino != inode:
            # A good one was published in between; but there may be a newer one still.
            with suppress(FileExistsError):
                files.link(aside, path)
            root.discard(aside)
            return True
    except FileNotFoundError:
        return True
    except OSError:
        return False
    text = f"{os.path.relpath(path, root.path)}\n{reason}\n".encode("utf-8", "backslashreplace")
    # From now on its time says when it came here.
    root.touch(aside)
    # The file itself is aside, which is what matters; a full disk may leave no room for the note.
    with suppress(OSError):
        with files.opened(files.create(aside + _NOTE)) as fd:
            files.write_all(fd, text)
        for surplus in excess(root):
            root.discard(surplus.path)
    return True


def excess(root: Root) -> list[Item]:
    """The oldest quarantined files beyond what may stay."""
    newest_first = sorted(root.items(Area.QUARANTINE), key=lambda item: item.modified, reverse=True)
    surplus, total, count = [], 0, 0
    for item in newest_first:
        total += item.size
        count += not item.path.endswith(_NOTE)
        if count > MAX_FILES or total > MAX_BYTES:
            surplus.append(item)
    return surplus
