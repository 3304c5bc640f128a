"""One root directory: reading its files, putting files in place, keeping blobs until an entry names them.

Publishing a file::

    create tmp/<host>.<random>.part exclusively, lock it, write, fsync       (errors: nothing happened)
    rename over the name
    fsync the directory                                                      (now it is acknowledged)

so that a reader sees a whole file or none, and what was acknowledged survives a crash. Methods raise
``OSError`` where the system refuses.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

from stitchcache.errors import EntryDamagedError, StitchCacheError, StoreWriteError, UntrustedEntryError
from stitchcache.records import dataclass, fill
from stitchcache.store import (
    CAP,
    KEYED,
    LEGACY_SUFFIXES,
    Area,
    Files,
    distrust,
    keyed_path,
    patiently,
    suffix_of,
    write_error,
)
from stitchcache.types import BlobRef, is_digest

T = TypeVar("T")
OnWait = Callable[[float, str], None]
"""Called while waiting for a lock, with the seconds waited and who holds it."""

_TAG_NAME = "CACHEDIR.TAG"
_TAG_TEXT = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# This file says that the directory is a cache: backups may leave it out, and it can be deleted.\n"
    b"# stitchcache keeps compiled PyTorch models here.\n"
)
# Small enough to stay in the processor's cache, and not to be mapped and unmapped each time.
_DIGESTED_AT_ONCE = 256 << 10
# What others have no business in: locks that they could hold, files that are not whole.
_PRIVATE = (Area.LOCKS, Area.TMP)
_BLOB_LOCKS = "blobs"
_OURS = {
    Area.TMP: r".+\.[0-9a-f]{16}\.(part|scratch)",
    Area.LOCKS: r"(prune|[0-9a-f]{64})\.lock",
    Area.QUARANTINE: r"[0-9a-f]{64}(\.[a-z]+)?\.[0-9a-f]{8}(\.reason)?",
}
_LARGE, _HEAD = 1 << 20, 4096
_LOOK_LASTS = 0.05


@dataclass(frozen=True, slots=True)
class Item:
    """A file as a scan saw it.

    The key is the one in its name, or the whole name. ``modified`` is its mtime in nanoseconds: its last use.
    """

    path: str
    key: str
    size: int
    modified: int

    def __hash__(self) -> int:
        # Not of all fields: the plan of a prune asks for it hundreds of thousands of times.
        return hash(self.path)


class Root:
    """A directory that the store owns; it need not exist.

    ``durable`` is whether to fsync, ``trust`` who vouches for its files: ``owner``, ``signed`` or ``any``.
    """

    def __init__(
        self, path: str, *, files: Files, durable: bool, read_only: bool, trust: str = "owner"
    ) -> None:
        self.path = path
        self.trust = trust
        self.files = files
        self.durable = durable
        self.read_only = read_only
        # What the last write that failed said.
        self.failure = "it is opened read-only" if read_only else ""
        self._known: set[str] = set()
        self._looked_above = -_LOOK_LASTS
        # Blobs that are kept from being evicted until an entry names them: each has a lock on a byte of one
        # file, for a lock on a blob itself could be held by everybody who can read the blob.
        self._held: set[str] = set()
        self._locks: int | None = None
        self._mutex = threading.Lock()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # When the interpreter ends, names of modules are gone: what it needs comes along.
        if self._locks is not None:
            try:
                close(self._locks)
            except OSError:
                pass

    def area(self, area: Area) -> str:
        """The directory of an area."""
        return os.path.join(self.path, area)

    # -- reading ---------------------------------------------------------------------------------

    def scan(self, path: str) -> list[os.DirEntry[str]]:
        """A directory's entries; none where it is missing, or where a link below the root stands for it.

        What is listed may be removed. Whoever can write the root could have a link lead anywhere.
        """
        try:
            is_link = path != self.path and stat.S_ISLNK(self.files.lstat(path).st_mode)
            return [] if is_link else self.files.scan(path)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def items(self, area: Area, prefix: str = "") -> Iterator[Item]:
        """Files of an area whose key begins so, older entries among them; foreign files are passed over."""
        for path, key in self.names(area, prefix):
            facts = self.facts(path)
            if facts is not None:
                seen = {"path": path, "key": key, "size": facts.st_size, "modified": facts.st_mtime_ns}
                # Not by the constructor, which looks at the fields: there may be thousands.
                yield fill(Item, seen)

    def names(self, area: Area, prefix: str = "") -> list[tuple[str, str]]:
        """Paths and keys of the files that :meth:`items` lists; one may be gone when it is opened."""
        if area in KEYED:
            shards = [each for each in self.scan(self.area(area)) if len(each.name) == 2]
            shards = [each for each in shards if each.name[: len(prefix)] == prefix[:2]]
            found = [each for shard in shards for each in self.scan(shard.path)]
            # Not by ``key_of``: there may be thousands.
            end, split = suffix_of(area), [(each, each.name[:64], each.name[64:]) for each in found]
            named = [(each.path, key) for each, key, rest in split if rest == end and is_digest(key)]
        else:
            # Others are not ours to remove, wherever the way leads when it is gone a second time.
            found = self.scan(self.area(area))
            named = [(each.path, each.name) for each in found if re.fullmatch(_OURS[area], each.name)]
        if area is Area.ENTRIES:
            old = [(each.path, *os.path.splitext(each.name)) for each in self.scan(self.path)]
            named += [(path, key) for path, key, kind in old if kind in LEGACY_SUFFIXES and is_digest(key)]
        return [each for each in named if each[1].startswith(prefix)] if prefix else named

    def facts(self, path: str) -> os.stat_result | None:
        """Facts about a file; ``None`` where there is none."""
        try:
            return self.files.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def has_blob(self, ref: BlobRef) -> bool:
        """Whether a file of a blob's name and size is there."""
        facts = self.facts(keyed_path(self.path, Area.BLOBS, ref.digest))
        return facts is not None and facts.st_size == ref.size

    def open(self, path: str, *, trusted: bool = False) -> int | None:
        """A descriptor for reading; ``None`` where there is no file.

        Raises:
            UntrustedEntryError: It is to be ``trusted``, and others can write or exchange it.
        """
        try:
            if trusted:
                self.require_trust(path)
            fd = self.files.open_read(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        reason = distrust(path, self.files.fstat(fd)) if trusted else None
        if reason is not None:
            self.files.close_quietly(fd)
            raise UntrustedEntryError(reason, path=path)
        return fd

    def read(self, path: str, area: Area, *, trusted: bool = False) -> tuple[bytes, os.stat_result] | None:
        """A whole file and its facts; ``None`` where there is none.

        Raises:
            EntryDamagedError: It is no regular file, or larger than files of its area can be.
            UntrustedEntryError: As :meth:`open`.
        """
        cap = CAP[area]
        reason = f"not a regular file of at most {cap} bytes"
        try:
            fd = self.open(path, trusted=trusted)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise EntryDamagedError.at(path, "size", reason) from error
        if fd is None:
            return None
        # Not by ``opened``: there may be thousands.
        try:
            facts = self.files.fstat(fd)
            # Nothing of ours begins with zeros, and a file with a hole may be of any size.
            hollow = facts.st_size > _LARGE and not self.files.pread(fd, _HEAD, 0).strip(b"\0")
            if stat.S_ISREG(facts.st_mode) and facts.st_size <= cap and not hollow:
                return self.files.read_exactly(fd, facts.st_size), facts
        finally:
            self.files.close_quietly(fd)
        raise EntryDamagedError.at(path, "size", reason)

    def require_trust(self, path: str) -> None:
        """Raise ``UntrustedEntryError`` where others can write a file, or a directory on the way to it."""
        # Directories first, from the top down: see distrusted_way. Nobody else can undo what was found above
        # the root, so the files of one start are one look.
        at, now = self.path, time.monotonic()
        if now - self._looked_above < _LOOK_LASTS:
            reason = distrust(at, self.files.stat(at))
        else:
            reason = self.files.distrusted_way(at)
            self._looked_above = now if reason is None else -_LOOK_LASTS
        for part in path[len(self.path) :].strip(os.sep).split(os.sep):
            if reason is None:
                at = os.path.join(at, part)
                reason = distrust(at, self.files.lstat(at))
        if reason is not None:
            raise UntrustedEntryError(reason, path=path)

    def blob_problem(self, fd: int, ref: BlobRef) -> str | None:
        """What is wrong with an open blob."""
        facts = self.files.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            return "not a regular file"
        if facts.st_size != ref.size:
            return f"{facts.st_size} bytes where {ref.size} are expected"
        found = hashlib.sha256()
        while chunk := self.files.read(fd, _DIGESTED_AT_ONCE):
            found.update(chunk)
        if found.hexdigest() != ref.digest:
            return f"sha256 {found.hexdigest()} where its name says {ref.digest}"
        return None

    # -- writing ---------------------------------------------------------------------------------

    @contextmanager
    def writing(self, path: str) -> Iterator[None]:
        """Turn what the system says against a write, and a read-only root, into a ``StoreWriteError``."""
        if self.read_only:
            message = f"{path}: the cache is opened read-only; nothing was stored"
            raise StoreWriteError(message, path=path, reason="read-only")
        try:
            yield
        except StitchCacheError:
            # It says already what is wrong.
            raise
        except OSError as error:
            failed = write_error(error, path)
            self.failure = failed.message
            raise failed from error

    def publish(self, path: str, data: bytes, *, last: bool = True) -> None:
        """Put a file in place, replacing what had its name; ``last`` is whether it must survive a power loss.

        After a ``StoreWriteError`` nothing changed, or it is not known whether it will last.
        """
        with self.writing(path):
            if last:
                self.make_dir(os.path.dirname(path))
            with self.temporary() as (temp, fd):
                self.files.write_all(fd, data)
                if last:
                    self.sync(fd)
                self.rename(temp, path)
            if last:
                self.sync_dir(os.path.dirname(path))

    def touch(self, path: str, nanoseconds: int | None = None) -> None:
        """Record a use, by default of now; where that is not allowed, it is not recorded."""
        with suppress(OSError):
            # Never the same time twice, so that a changed time always shows.
            self.files.utime(path, time.time_ns() if nanoseconds is None else nanoseconds)

    def discard(self, path: str) -> None:
        """Remove a file that nobody needs; what is left is found by the next prune."""
        with suppress(OSError):
            self.files.unlink(path)

    def sync(self, fd: int) -> None:
        """Wait for a file to be on the disk, where durability is asked for."""
        if self.durable:
            self.files.fsync(fd)

    def sync_dir(self, path: str) -> None:
        """Wait for a directory's names to be on the disk, where durability is asked for."""
        if self.durable:
            self.files.fsync_dir(path)

    def temporary_path(self, kind: str) -> str:
        """A name in ``tmp`` that no other process or thread makes; it begins with this host's."""
        return os.path.join(self.area(Area.TMP), f"{host_name()}.{os.urandom(8).hex()}.{kind}")

    @contextmanager
    def temporary(self) -> Iterator[tuple[str, int]]:
        """Path and descriptor of a new file, which goes at the end unless it was given another name.

        It has a shared lock: a temporary file without one was left by a process that died.
        """
        while True:
            path = self.temporary_path("part")
            with self.files.opened(self.in_dir(path, self._create)) as fd:
                try:
                    # A prune may come in between, and take the file for one that was left.
                    if self.files.lock_shared(fd, path):
                        yield path, fd
                        return
                finally:
                    self.discard(path)

    def rename(self, temp: str, target: str) -> None:
        """Give a temporary file its name, replacing what had it."""
        self.in_dir(target, lambda path: self.files.rename(temp, path))

    def in_dir(self, path: str, act: Callable[[str], T]) -> T:
        """Do something to a path, after making its directory where that is missing."""
        try:
            return act(path)
        except FileNotFoundError:
            # The first write, or somebody removed the cache while it is in use; that is allowed.
            self._known.clear()
            self.make_dir(os.path.dirname(path))
            return act(path)

    def make_dir(self, path: str) -> None:
        """Make a directory of the root, and those above it, durably."""
        if path in self._known:
            return
        if path != self.path:
            self.make_dir(os.path.dirname(path))
        self._mkdir(path)
        if self.trust == "owner":
            self.require_own(path)
        if path == self.path:
            # A courtesy to backup programs.
            with suppress(OSError), self.files.opened(self._create(f"{path}/{_TAG_NAME}")) as fd:
                self.files.write_all(fd, _TAG_TEXT)
        # Whoever made it may not have come to this yet, so each process does it once for itself.
        self.sync_dir(os.path.dirname(path))
        self._known.add(path)

    def _mkdir(self, path: str) -> None:
        inside, private = len(path) > len(self.path), os.path.basename(path) in _PRIVATE
        mode = 0o755 if len(path) < len(self.path) else 0o700
        try:
            self.files.mkdir(path, self._mode(0o755) if inside and not private else mode)
        except FileExistsError:
            # A link below the root may lead anywhere; under "owner", require_own says why not.
            look = self.files.lstat if inside and self.trust != "owner" else self.files.stat
            if not stat.S_ISDIR(look(path).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
        except FileNotFoundError:
            self._mkdir(os.path.dirname(path))
            self.files.mkdir(path, mode)

    def _mode(self, most: int) -> int:
        """The mode of what is made: who can read the root's directory can read what is in it."""
        facts = self.files.stat(self.path)
        # What root makes in a user's cache is of use to that user only if it can be read.
        shared = stat.S_IMODE(facts.st_mode) if facts.st_uid == os.geteuid() else most
        return most & (shared | stat.S_IRWXU)

    def _create(self, path: str) -> int:
        return self.files.create(path, self._mode(0o644))

    def require_own(self, path: str) -> None:
        """Raise a ``StoreWriteError`` where others can write a directory of the root, or exchange it."""
        try:
            self.require_trust(path)
        except UntrustedEntryError as error:
            message = f"{error.message} (nothing is stored or built in it)"
            raise StoreWriteError(message, path=path, reason="not trusted") from error

    # -- blobs that no entry names yet -----------------------------------------------------------

    def lock_file(self) -> int:
        """Open the file on whose bytes locks stand for blobs. Nobody else can open it, and so hold one."""
        path = os.path.join(self.area(Area.LOCKS), _BLOB_LOCKS)
        self.make_dir(os.path.dirname(path))
        return self.in_dir(path, self.files.open_or_create)

    def lock_blob(self, fd: int, digest: str, kind: int) -> bool | None:
        """Lock a blob, or end that, without waiting: as :meth:`Files.attempt` tells."""
        return self.files.attempt(self.files.lock_byte, fd, kind, int(digest[:15], 16))

    def holds(self, digest: str) -> bool:
        """Whether a blob is kept by this object."""
        return digest in self._held

    def keep(self, digest: str) -> None:
        """Keep a blob from being evicted; where locks do not work, the grace period has to."""
        path = os.path.join(self.area(Area.LOCKS), _BLOB_LOCKS)
        with self._mutex, suppress(OSError):
            if self._locks is not None and not self.files.same_file(self._locks, path):
                # Somebody removed the cache, with all that was kept.
                self.files.close_quietly(self._locks)
                self._locks = None
                self._held.clear()
            if self._locks is None:
                self._locks = self.lock_file()
            # Eviction has it for one unlink.
            patiently(partial(self.lock_blob, self._locks, digest, fcntl.F_RDLCK))
            self._held.add(digest)

    def release(self, digests: Iterable[str]) -> None:
        """Let go of blobs: an entry names them now, or nobody will."""
        with self._mutex:
            for digest in self._held.intersection(digests):
                self._held.discard(digest)
                if self._locks is not None:
                    self.lock_blob(self._locks, digest, fcntl.F_UNLCK)


def host_name() -> str:
    """This host's part of temporary names."""
    return os.uname().nodename.replace(os.sep, "_")[:64]
