"""One root directory: what every operation on it needs, and reading from it."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stitchcache.errors import EntryDamagedError, StitchCacheError, StoreWriteError
from stitchcache.store.files import (
    CHUNK,
    Files,
    close_quietly,
    distrust,
    is_dir,
    is_file,
    opened,
    read_exactly,
    write_all,
    write_error,
)
from stitchcache.store.layout import TAG_NAME, TAG_TEXT, Area

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass


_TEN_YEARS = 10 * 365 * 86_400 * 1_000_000_000

Identity = tuple[int, int, int, int, int]


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

    def __repr__(self) -> str:
        return f"Root({self.path!r})"

    @property
    def host(self) -> str:
        """This host's part of temporary names."""
        from stitchcache.store.locks import host_token

        if not self._host:
            self._host = host_token()
        return self._host

    def area(self, area: Area) -> str:
        """The directory of an area."""
        return os.path.join(self.path, area)

    # -- reading ---------------------------------------------------------------------------------

    def scan(self, path: str) -> list[os.DirEntry[str]]:
        """A directory's entries; none where it is missing.

        Raises:
            OSError: It cannot be listed.
        """
        try:
            return self.files.scan(path)
        except (FileNotFoundError, NotADirectoryError):
            return []

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
                reason = f"{facts.st_size} bytes, over the limit of {cap}"
                reason = reason if is_file(facts) else "not a regular file"
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
        for part in path[len(self.path) :].strip(os.sep).split(os.sep):
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
            problem = self.blob_problem(fd, facts, digest, size)
        finally:
            close_quietly(self.files, fd)
        return identity_of(facts) if problem is None else problem

    def blob_problem(self, fd: int, facts: os.stat_result, digest: str, size: int) -> str | None:
        """What is wrong with an open blob.

        Raises:
            OSError: It cannot be read.
        """
        if not is_file(facts):
            return "not a regular file"
        if facts.st_size != size:
            return f"{facts.st_size} bytes where {size} are expected"
        found = hashlib.sha256()
        # Small enough to stay in the processor's cache, and not to be mapped and unmapped each time.
        while chunk := self.files.read(fd, CHUNK >> 2):
            found.update(chunk)
        if found.hexdigest() != digest:
            return f"sha256 {found.hexdigest()} where its name says {digest}"
        return None

    # -- writing ---------------------------------------------------------------------------------

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
        except OSError as error:
            if isinstance(error, StitchCacheError):
                # It says already what is wrong.
                raise
            raise write_error(error, path) from error

    def touch(self, path: str, *, long_ago: bool = False) -> None:
        """Record a use, or that there is none; where that is not allowed, it is not recorded."""
        try:
            # Never the same time twice, so that a changed time always shows.
            self.files.utime(path, time.time_ns() - (_TEN_YEARS if long_ago else 0))
        except OSError:
            pass

    def discard(self, path: str) -> None:
        """Remove a temporary file; what is left is found by the next prune."""
        try:
            self.files.unlink(path)
        except OSError:
            pass

    def sync(self, fd: int) -> None:
        """Wait for a file to be on the disk, where durability is asked for."""
        if self.durable:
            self.files.fsync(fd)

    def sync_dir(self, path: str) -> None:
        """Wait for a directory's names to be on the disk, where durability is asked for."""
        if self.durable:
            self.files.fsync_dir(path)

    def create_temp(self) -> tuple[str, int]:
        """A new file of a name of its own, on the root's file system."""
        from stitchcache.store.locks import temporary_name

        directory = self.area(Area.TMP)
        temp = os.path.join(directory, temporary_name(self.host, "part"))
        try:
            return temp, self.files.create(temp)
        except FileNotFoundError:
            # The first write, or somebody removed the cache under us.
            self._known.clear()
            self.make_dir(directory)
            return temp, self.files.create(temp)

    def rename(self, temp: str, target: str) -> None:
        """Give a temporary file its name, replacing what had it."""
        try:
            self.files.rename(temp, target)
        except FileNotFoundError:
            # Somebody removed directories of the cache while it is in use; that is allowed.
            self._known.clear()
            self.make_dir(os.path.dirname(target))
            self.files.rename(temp, target)

    def make_dir(self, path: str) -> None:
        """Make a directory of the root, and those above it, durably.

        Raises:
            OSError: It cannot be made, or a file has its name.
        """
        if path in self._known:
            return
        if path != self.path:
            self.make_dir(os.path.dirname(path))
        try:
            self._mkdir(path)
        except FileNotFoundError:
            self._make_above(path)
            self._mkdir(path)
        if path == self.path:
            self._write_tag()
        # Whoever made it may not have come to this yet, so each process does it once for itself.
        self.sync_dir(os.path.dirname(path))
        self._known.add(path)

    def _make_above(self, path: str) -> None:
        parent = os.path.dirname(path)
        try:
            self._mkdir(parent)
        except FileNotFoundError:
            self._make_above(parent)
            self._mkdir(parent)

    def _mkdir(self, path: str) -> None:
        try:
            self.files.mkdir(path)
        except FileExistsError:
            if not is_dir(self.files.stat(path)):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None

    def _write_tag(self) -> None:
        tag = os.path.join(self.path, TAG_NAME)
        try:
            with opened(self.files, self.files.create(tag)) as fd:
                write_all(self.files, fd, TAG_TEXT)
        except OSError:
            # It is a courtesy to backup programs.
            pass
