"""One root directory: publish whole files durably, read them back, hold and quarantine them.

Publishing a file::

    create tmp/<host>.<pid>.<random>.part exclusively, write, fsync, close      (errors: nothing happened)
    rename over the target (pointers, entries) or link without replacing (blobs)
    fsync the directory                                                        (now it is acknowledged)

so that a reader sees a whole file or none, and what was acknowledged survives a crash.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from stitchcache.errors import EntryDamagedError, StoreWriteError
from stitchcache.store.files import (
    CHUNK,
    Files,
    close_quietly,
    is_dir,
    is_file,
    opened,
    read_exactly,
    write_all,
)
from stitchcache.store.layout import TAG_NAME, TAG_TEXT, Area, keyed_path
from stitchcache.store.locks import hold_shared, try_lock
from stitchcache.store.names import host_token, temporary_name
from stitchcache.store.trust import distrust

Identity = tuple[int, int, int, int, int]

_NO_LINKS = frozenset(
    {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EACCES}
)
_HELD_AT_MOST = 512
_QUARANTINE_FILES, _QUARANTINE_BYTES = 64, 256 << 20


@dataclass(frozen=True, slots=True)
class Found:
    """A file that was read.

    Args:
        path: Where it lies.
        data: All of its bytes.
        identity: Which file it was, should the name lead to another one later.
        modified: Its mtime, in nanoseconds.
    """

    path: str
    data: bytes
    identity: Identity
    modified: int


def identity_of(facts: os.stat_result) -> Identity:
    """What tells a file, and its state, from every other."""
    return (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


class Root:
    """A directory that the store owns.

    Args:
        path: The directory; it need not exist.
        files: File-system calls.
        durable: Whether to fsync.
        read_only: Never write, even where it would work.
    """

    def __init__(self, path: str, *, files: Files, durable: bool, read_only: bool) -> None:
        self.path = path
        self.files = files
        self.durable = durable
        self.read_only = read_only
        self._host = ""
        self._known: set[str] = set()
        self._held: dict[str, int] = {}
        self._mutex = threading.Lock()

    def __del__(self) -> None:
        for fd in self.__dict__.get("_held", {}).values():
            close_quietly(self.files, fd)

    def __repr__(self) -> str:
        return f"Root({self.path!r})"

    @property
    def host(self) -> str:
        """This host's part of temporary names."""
        if not self._host:
            self._host = host_token()
        return self._host

    def area(self, area: Area) -> str:
        """The directory of an area."""
        return os.path.join(self.path, area)

    # -- reading ---------------------------------------------------------------------------------

    def read(self, path: str, cap: int) -> Found | None:
        """A whole file.

        Args:
            path: The file.
            cap: Most bytes it can have.

        Returns:
            ``None`` where there is none.

        Raises:
            EntryDamagedError: It is no regular file, or larger than the cap.
            OSError: It cannot be read.
        """
        try:
            fd = self.files.open_read(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            facts = self.files.fstat(fd)
            if not is_file(facts) or facts.st_size > cap:
                reason = (
                    f"{facts.st_size} bytes are more than {cap}" if is_file(facts) else "not a regular file"
                )
                raise EntryDamagedError(f"{path}: {reason}", path=path, field="size", reason=reason)
            data = read_exactly(self.files, fd, facts.st_size)
        finally:
            close_quietly(self.files, fd)
        return Found(path, data, identity_of(facts), facts.st_mtime_ns)

    def distrust(self, path: str) -> str | None:
        """Why a file of this root, or a directory on the way to it, is not trusted; ``None`` when all are.

        Raises:
            OSError: One cannot be looked at.
        """
        at = self.path
        reason = distrust(at, self.files.stat(at))
        for part in os.path.relpath(path, self.path).split(os.sep):
            if reason is not None:
                break
            at = os.path.join(at, part)
            reason = distrust(at, self.files.lstat(at))
        return reason

    def blob_state(self, path: str, digest: str, size: int) -> Identity | str | None:
        """Check a blob against its name.

        Returns:
            Which file was found good; a text saying what is wrong with it; ``None`` where there is none.

        Raises:
            OSError: It cannot be read.
        """
        try:
            fd = self.files.open_read(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            facts = self.files.fstat(fd)
            problem = self._blob_problem(fd, facts, digest, size)
        finally:
            close_quietly(self.files, fd)
        return identity_of(facts) if problem is None else problem

    def _blob_problem(self, fd: int, facts: os.stat_result, digest: str, size: int) -> str | None:
        if not is_file(facts):
            return "not a regular file"
        if facts.st_size != size:
            return f"{facts.st_size} bytes where {size} are expected"
        found = hashlib.sha256()
        while chunk := self.files.read(fd, CHUNK):
            found.update(chunk)
        return (
            None
            if found.hexdigest() == digest
            else f"sha256 {found.hexdigest()} where its name says {digest}"
        )

    # -- writing ---------------------------------------------------------------------------------

    def publish(self, area: Area, key: str, data: bytes) -> str:
        """Put a file in place, replacing what had its name.

        Returns:
            Its path.

        Raises:
            StoreWriteError: It cannot be written; nothing changed, or the change is not known to be durable.
        """
        target = keyed_path(self.path, area, key)
        with self.writing(target):
            self._prepare(target)
            temp, fd = self._create_temp()
            try:
                with opened(self.files, fd):
                    write_all(self.files, fd, data)
                    self._sync(fd)
                self._rename(temp, target)
            except BaseException:
                self.discard(temp)
                raise
            self._sync_dir(os.path.dirname(target))
        return target

    def publish_blob(self, source: bytes | str) -> tuple[str, int]:
        """Put a blob in place under its digest, and hold it until :meth:`release`.

        Args:
            source: The bytes, or the path of a file that has them.

        Returns:
            Digest and size.

        Raises:
            StoreWriteError: It cannot be written.
        """
        with self.writing(self.area(Area.BLOBS)):
            temp, fd = self._create_temp()
            try:
                digest, size = self._fill(fd, source)
                self._place_blob(temp, fd, digest, size)
            except BaseException:
                close_quietly(self.files, fd)
                self.discard(temp)
                raise
        return digest, size

    def _fill(self, fd: int, source: bytes | str) -> tuple[str, int]:
        if isinstance(source, bytes):
            write_all(self.files, fd, source)
            return hashlib.sha256(source).hexdigest(), len(source)
        digest, size = hashlib.sha256(), 0
        with opened(self.files, self.files.open_read(source, follow=True)) as reader:
            while chunk := self.files.read(reader, CHUNK):
                digest.update(chunk)
                size += len(chunk)
                write_all(self.files, fd, chunk)
        return digest.hexdigest(), size

    def _place_blob(self, temp: str, fd: int, digest: str, size: int) -> None:
        target = keyed_path(self.path, Area.BLOBS, digest)
        self._prepare(target)
        if self._adopt(target, digest, size):
            close_quietly(self.files, fd)
            self.discard(temp)
            return
        self._sync(fd)
        # Held before it has a name, so that no eviction comes in between.
        try_lock(self.files, fd, shared=True)
        try:
            self.files.link(temp, target)
        except FileExistsError:
            # Somebody was faster, or a damaged one is in the way: then this one replaces it.
            if self._adopt(target, digest, size):
                close_quietly(self.files, fd)
                self.discard(temp)
                return
            self._rename(temp, target)
        except OSError as error:
            if error.errno not in _NO_LINKS and error.errno != errno.ENOENT:
                raise
            self._rename(temp, target)
        else:
            self.discard(temp)
        self._sync_dir(os.path.dirname(target))
        self._keep(digest, fd)

    def hold_blob(self, digest: str, size: int) -> bool:
        """Keep a blob that is there from being evicted until :meth:`release`; no check of its digest.

        Raises:
            OSError: It cannot be opened.
        """
        with self._mutex:
            if digest in self._held:
                return True
        path = keyed_path(self.path, Area.BLOBS, digest)
        fd = hold_shared(self.files, path)
        if fd is None:
            return False
        try:
            good = self.files.fstat(fd).st_size == size
            if good and not self.read_only:
                self.touch(path)
                self._sync(fd)
                self._sync_dir(os.path.dirname(path))
        except BaseException:
            close_quietly(self.files, fd)
            raise
        if not good:
            close_quietly(self.files, fd)
            return False
        self._keep(digest, fd)
        return True

    def _adopt(self, target: str, digest: str, size: int) -> bool:
        """Use the blob that is already there, if it is good."""
        with self._mutex:
            if digest in self._held:
                # Held, so it cannot have been evicted; but whether its bytes are good is another question.
                close_quietly(self.files, self._held.pop(digest))
        fd = hold_shared(self.files, target)
        if fd is None:
            return False
        try:
            problem = self._blob_problem(fd, self.files.fstat(fd), digest, size)
            if problem is None:
                self.touch(target)
                # Its writer may have died, or not yet come, to these.
                self._sync(fd)
                self._sync_dir(os.path.dirname(target))
        except BaseException:
            close_quietly(self.files, fd)
            raise
        if problem is not None:
            close_quietly(self.files, fd)
            return False
        self._keep(digest, fd)
        return True

    def _keep(self, digest: str, fd: int) -> None:
        with self._mutex:
            old = self._held.pop(digest, None)
            self._held[digest] = fd
            surplus = [self._held.pop(next(iter(self._held)))] if len(self._held) > _HELD_AT_MOST else []
        for each in (old, *surplus):
            if each is not None:
                close_quietly(self.files, each)

    def release(self, digests: Iterator[str] | list[str]) -> None:
        """Let go of blobs: an entry names them now, or nobody will."""
        for digest in digests:
            with self._mutex:
                fd = self._held.pop(digest, None)
            if fd is not None:
                close_quietly(self.files, fd)

    def touch(self, path: str) -> None:
        """Record a use; where that is not allowed, it is not recorded."""
        try:
            self.files.utime(path, time.time_ns())
        except OSError:
            pass

    def remove(self, path: str) -> bool:
        """Remove a file; False where there was none.

        Raises:
            OSError: It cannot be removed.
        """
        try:
            self.files.unlink(path)
        except FileNotFoundError:
            return False
        return True

    def discard(self, path: str) -> None:
        """Remove a temporary file; what is left is found by the next prune."""
        try:
            self.files.unlink(path)
        except OSError:
            pass

    def quarantine(self, path: str, identity: Identity | None, reason: str) -> bool:
        """Take a damaged file out of the way, and keep it for whoever wants to know why.

        Args:
            path: The file.
            identity: Which file was found damaged; one that took its place since is left alone.
            reason: Kept beside it.

        Returns:
            Whether the name is free now.
        """
        if self.read_only:
            return False
        aside = os.path.join(self.area(Area.QUARANTINE), f"{os.path.basename(path)}.{secrets.token_hex(4)}")
        try:
            self.make_dir(self.area(Area.QUARANTINE))
            self.files.rename(path, aside)
            if identity is not None and self.files.lstat(aside).st_ino != identity[1]:
                # A good one was published in between: put it back, unless there is a newer one still.
                self._put_back(aside, path)
                return True
            self._write_reason(f"{aside}.reason", path, reason)
            self.cap_quarantine()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def _put_back(self, aside: str, path: str) -> None:
        try:
            self.files.link(aside, path)
        except FileExistsError:
            pass
        self.discard(aside)

    def _write_reason(self, name: str, path: str, reason: str) -> None:
        text = f"{os.path.relpath(path, self.path)}\n{reason}\n".encode("utf-8", "backslashreplace")
        try:
            with opened(self.files, self.files.create(name)) as fd:
                write_all(self.files, fd, text)
        except OSError:
            # The file itself is aside, which is what matters; a full disk may leave no room for the note.
            pass

    def cap_quarantine(
        self, max_files: int = _QUARANTINE_FILES, max_bytes: int = _QUARANTINE_BYTES
    ) -> tuple[int, int]:
        """Remove the oldest quarantined files beyond a number and a size.

        Returns:
            Files and bytes removed.
        """
        try:
            entries = [
                (item.stat(follow_symlinks=False), item.path)
                for item in self.scan(self.area(Area.QUARANTINE))
            ]
        except OSError:
            return 0, 0
        entries.sort(key=lambda pair: pair[0].st_ctime_ns, reverse=True)
        size = removed = freed = 0
        for files, (facts, path) in enumerate(entries, 1):
            size += facts.st_size
            if files > 2 * max_files or size > max_bytes:
                self.discard(path)
                removed += 1
                freed += facts.st_size
        return removed, freed

    def scan(self, path: str) -> list[os.DirEntry[str]]:
        """A directory's entries; none where it is missing."""
        try:
            return self.files.scan(path)
        except (FileNotFoundError, NotADirectoryError):
            return []

    # -- directories -----------------------------------------------------------------------------

    def make_dir(self, path: str) -> None:
        """Make a directory under the root, and those above it, durably.

        Raises:
            OSError: It cannot be made, or a file has its name.
        """
        if path in self._known:
            return
        try:
            self.files.mkdir(path)
        except FileExistsError:
            if not is_dir(self.files.stat(path)):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
        except FileNotFoundError:
            parent = os.path.dirname(path)
            if parent == path:
                raise
            self.make_dir(parent)
            self._mkdir_again(path)
        if path == self.path:
            self._write_tag()
        # Whoever made it may not have come to this yet, so each process does it once for itself.
        if path.startswith(self.path):
            self._sync_dir(os.path.dirname(path))
        self._known.add(path)

    def _mkdir_again(self, path: str) -> None:
        try:
            self.files.mkdir(path)
        except FileExistsError:
            # Another process started with the same empty cache.
            pass

    def _write_tag(self) -> None:
        tag = os.path.join(self.path, TAG_NAME)
        try:
            with opened(self.files, self.files.create(tag)) as fd:
                write_all(self.files, fd, TAG_TEXT)
        except OSError:
            # It is a courtesy to backup programs.
            pass

    def _prepare(self, target: str) -> None:
        """Make the directory of a file to be published, and every one above it."""
        shard = os.path.dirname(target)
        if shard not in self._known:
            for directory in (self.path, os.path.dirname(shard), shard):
                self.make_dir(directory)

    def _rename(self, temp: str, target: str) -> None:
        try:
            self.files.rename(temp, target)
        except FileNotFoundError:
            # Somebody removed directories of the cache while it is in use; that is allowed.
            self._known.clear()
            self._prepare(target)
            self.files.rename(temp, target)

    def _create_temp(self) -> tuple[str, int]:
        directory = self.area(Area.TMP)
        temp = os.path.join(directory, temporary_name(self.host, "part"))
        try:
            return temp, self.files.create(temp)
        except FileNotFoundError:
            # The first write, or somebody removed the cache under us.
            self._known.clear()
            self.make_dir(self.path)
            self.make_dir(directory)
            return temp, self.files.create(temp)

    def _sync(self, fd: int) -> None:
        if self.durable:
            self.files.fsync(fd)

    def _sync_dir(self, path: str) -> None:
        if self.durable:
            self.files.fsync_dir(path)

    @contextmanager
    def writing(self, path: str) -> Iterator[None]:
        """Turn what the system says against a write into an error that says what to do.

        Raises:
            StoreWriteError: The block raised ``OSError``, or this root is read-only.
        """
        if self.read_only:
            raise StoreWriteError(
                f"{path}: the cache is opened read-only; nothing was stored", path=path, reason="read-only"
            )
        try:
            yield
        except StoreWriteError:
            raise
        except OSError as error:
            raise write_error(error, path) from error


_ADVICE = {
    errno.ENOSPC: "the disk is full: free space (`stitchcache prune`), or set STITCHCACHE_DIR elsewhere",
    errno.EDQUOT: "the quota is used up: free space (`stitchcache prune`), or set STITCHCACHE_DIR elsewhere",
    errno.EROFS: "the file system is read-only: set STITCHCACHE_DIR to a writable directory",
    errno.EACCES: "permission is denied: check the owner, or set STITCHCACHE_DIR to a directory of yours",
    errno.EPERM: "permission is denied: check the owner, or set STITCHCACHE_DIR to a directory of yours",
    errno.EMFILE: "this process has too many open files: raise `ulimit -n`",
    errno.ENFILE: "the system has too many open files",
    errno.ENOTDIR: "a file stands where a directory should be: move it, or set STITCHCACHE_DIR elsewhere",
    errno.ESTALE: "the network file system lost it: try again, or set STITCHCACHE_DIR to a local directory",
    errno.EIO: "the device reports an error: look at the system's log, or set STITCHCACHE_DIR elsewhere",
}


def write_error(error: OSError, path: str) -> StoreWriteError:
    """The store's error for a failed system call."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    where = error.filename if isinstance(error.filename, str) else path
    advice = _ADVICE.get(error.errno or 0, "check the directory with `stitchcache doctor`")
    return StoreWriteError(f"{where}: cannot be written ({reason}): {advice}", path=where, reason=reason)
