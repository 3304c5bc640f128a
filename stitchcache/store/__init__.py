"""The store: where things lie under a root, what settings say, and the file system's calls.

Only checked keys become paths. What makes no sense is an ``OptionError``. All calls go through
:class:`Calls`, so that a test can fail, delay or record any of them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from typing import Any, Literal

from stitchcache.errors import OptionError, StoreError, StoreWriteError, check_kind
from stitchcache.types import is_digest


class Area(StrEnum):
    """A directory of a root."""

    ENTRIES = "entries"
    TARGETS = "targets"
    PIECES = "pieces"
    BLOBS = "blobs"
    QUARANTINE = "quarantine"
    LOCKS = "locks"
    STATS = "stats"
    TMP = "tmp"


# Most bytes that a file can have; asked before it is read.
CAP = {Area.ENTRIES: 2 << 30, Area.TARGETS: 64 << 20, Area.PIECES: 64 << 20, Area.STATS: 1 << 20}
KEYED = (Area.ENTRIES, Area.TARGETS, Area.PIECES, Area.BLOBS)
LEGACY_SUFFIXES = (".msgpack", ".pkl")


def check_key(key: str) -> str:
    """The key itself, when it may become a path."""
    if not is_digest(key):
        raise OptionError(f"{key!r} is no key: 64 lowercase hex digits are needed", option="key")
    return key


def keyed_path(root: str, area: Area, key: str) -> str:
    """The file of a key."""
    check_key(key)
    return f"{root}/{area}/{key[:2]}/{key}{suffix_of(area)}"


def possible_paths(root: str, area: Area, key: str) -> list[str]:
    """Files that may hold what a key names: for an entry those of older formats too."""
    suffixes = LEGACY_SUFFIXES if area is Area.ENTRIES else ()
    return [keyed_path(root, area, key), *(f"{root}/{key}{suffix}" for suffix in suffixes)]


def key_of(area: Area, name: str) -> str | None:
    """The key in a file's name; ``None`` for a foreign file."""
    return name[:64] if name[64:] == suffix_of(area) and is_digest(name[:64]) else None


def suffix_of(area: Area) -> str:
    """What follows the key in names of an area's files."""
    return ".stitch" if area is Area.ENTRIES else ""


# -- settings ------------------------------------------------------------------------------------

CHECKS = ("example", "background", "none")
"""When a hit is compared with the model itself; the first is the default."""

Roots = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def root_paths(root: Roots | None) -> list[str]:
    """Absolute paths of the roots that an argument names, or of the default; a file is a ``StoreError``."""
    if root is None:
        paths = default_roots()
    else:
        roots: list[Any] = list(root) if isinstance(root, (list, tuple)) else [root]
        for each in roots:
            check_kind("root", each, (str, os.PathLike), "a directory, or a list of layers")
        if not roots or any(not os.fspath(path) for path in roots):
            raise OptionError("root: a cache needs a directory, and got an empty name", option="root")
        paths = [_absolute(os.fspath(path)) for path in roots]
    for path in paths:
        mode = stat.S_IFDIR
        # One that is missing, or not to be seen: reads will miss, and writes will say why they cannot.
        with suppress(OSError):
            mode = os.stat(path).st_mode
        if not stat.S_ISDIR(mode):
            raise StoreError(
                f"{path}: is not a directory, so it cannot be a cache: move that file away, or name another "
                "directory (root=..., or STITCHCACHE_DIR)",
                path=path,
            )
    return paths


def default_roots() -> list[str]:
    """The directories where none is named: those of ``STITCHCACHE_DIR``, or the user's cache directory."""
    configured = os.environ.get("STITCHCACHE_DIR")
    if configured:
        return split_roots(configured, option="STITCHCACHE_DIR")
    import platformdirs

    return [str(platformdirs.user_cache_dir("stitchcache", appauthor=False))]


def split_roots(text: str, *, option: str) -> list[str]:
    """Absolute paths of the layers in a text such as ``upper:lower``."""
    parts = text.split(os.pathsep)
    if not all(parts):
        raise OptionError(
            f"{option}={text!r}: a layer has no name; write one directory, or upper:lower", option=option
        )
    return [_absolute(part) for part in parts]


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _setting(name: str) -> str:
    return os.environ.get(name, "").strip().lower()


def flag(name: str, *, also: str = "") -> bool:
    """An environment variable that is on or off; missing is off."""
    value = _setting(name)
    if value in ("", "0", "false", "no", "off"):
        return False
    if value in ("1", "true", "yes", "on"):
        return True
    raise OptionError(f"{name}={value!r}: use 1 or 0{also}", option=name)


def choice(name: str, known: Sequence[str]) -> str:
    """An environment variable that names one of several things; missing is the first."""
    value = _setting(name) or known[0]
    if value not in known:
        raise OptionError(f"{name}={value!r}: use {', '.join(known)}", option=name)
    return value


def required() -> Literal["nothing", "hit", "direct"]:
    """``STITCHCACHE_REQUIRE``: 1 makes a compilation an error, ``direct`` a trace too."""
    if _setting("STITCHCACHE_REQUIRE") == "direct":
        return "direct"
    return "hit" if flag("STITCHCACHE_REQUIRE", also=" or direct") else "nothing"


REMOTES = ("s3://", "gs://", "az://", "oci://", "file://")

TRUST = ("owner", "signed", "any")
"""What vouches for files; the first is the default."""


def trust_of(trust: str | Sequence[str] | None, roots: int) -> list[str]:
    """Who vouches in each of so many roots: the argument, else ``STITCHCACHE_TRUST`` (``owner:signed``)."""
    if trust is None:
        trust = _setting("STITCHCACHE_TRUST") or TRUST[0]
    named = trust.split(":") if isinstance(trust, str) else list(trust)
    if any(each not in TRUST for each in named) or len(named) not in (1, roots):
        said = f"trust={trust!r}: use {', '.join(TRUST)}, once for all {roots} roots or once for each"
        raise OptionError(said, option="trust")
    return named * roots if len(named) == 1 else named


def max_size() -> int | None:
    """``STITCHCACHE_MAX_SIZE`` in bytes; ``None`` where it is not set."""
    text = _setting("STITCHCACHE_MAX_SIZE")
    return parse_size(text, option="STITCHCACHE_MAX_SIZE") if text else None


def parse_size(text: str, *, option: str = "size") -> int:
    """Bytes in a text such as ``10G``, ``500 MiB`` or ``1048576``; units are powers of 1024."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(?:i?b)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise OptionError(f"{option}={text!r}: use a number with K, M, G or T, such as 10G", option=option)
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))


# -- trust ---------------------------------------------------------------------------------------

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def distrust(path: str, facts: os.stat_result, *, above: bool = False) -> str | None:
    """Why a file or directory is not trusted; ``None`` when it is.

    What an entry holds is code: a file that others can write or exchange is as good as theirs. ``above`` is
    for what leads to a root: there others may write beside it, if they cannot rename it.
    """
    mode = facts.st_mode
    # Ownership by root is no weaker: root can do anything to the process anyway.
    own = facts.st_uid in (os.geteuid(), 0)
    # An access list cannot give more than the mode: the mode's group bits are its mask.
    fixed = not mode & _OTHERS_WRITE or (above and mode & stat.S_ISVTX)
    if stat.S_ISLNK(mode):
        fixed = above
    elif stat.S_ISREG(mode):
        # None is left where a newer file took the name since this one was opened.
        fixed = fixed and facts.st_nlink <= 1
    if own and fixed:
        return None
    # Seldom needed.
    from stitchcache.store.refusal import refusal

    return refusal(path, facts, above=above)


def distrusted_way(path: str, *, of_torch: bool = False) -> str | None:
    """Why a directory is not trusted, or one above it; ``None`` where nobody else can exchange it.

    One ``of_torch`` has the modes that the umask gives: a user's private group may write it.

    From the top down: the name of what was looked at cannot be given to something else any more when the
    next is looked at. So what is opened by this path afterwards is what was looked at.
    """
    at, todo, links = os.sep, _parts(path), 0
    reason = distrust(at, os.lstat(at), above=True)
    while todo and reason is None:
        part = todo.pop()
        if part == os.pardir:
            at = os.path.dirname(at)
            continue
        at = os.path.join(at, part)
        facts = os.lstat(at)
        reason = distrust(at, facts, above=True)
        if stat.S_ISLNK(facts.st_mode) and reason is None:
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            target = os.readlink(at)
            at = os.sep if target.startswith(os.sep) else os.path.dirname(at)
            todo += _parts(target)
    facts = os.lstat(at)
    return reason or distrust(at, facts, above=of_torch and not facts.st_mode & stat.S_ISVTX)


_MOST_LINKS = 40


def _parts(path: str) -> list[str]:
    """The steps of a path, last first."""
    return [part for part in reversed(path.split(os.sep)) if part not in ("", os.curdir)]


# -- the file system -------------------------------------------------------------------------------

# Waiting for a lock that is held for a moment: one second in all.
_MOST_TRIES, _PAUSE = 200, 0.005


def patiently(attempt: Callable[[], bool | None]) -> bool | None:
    """Try for a lock for about a second; what the last attempt gave, ``False`` if another still has it."""
    for _ in range(_MOST_TRIES):
        had = attempt()
        if had is not False:
            return had
        time.sleep(_PAUSE)
    return False


class Calls:
    """The operating system's calls. They raise ``OSError``."""

    close = staticmethod(os.close)
    read = staticmethod(os.read)
    pread = staticmethod(os.pread)
    write = staticmethod(os.write)
    fsync = staticmethod(os.fsync)
    fstat = staticmethod(os.fstat)
    stat = staticmethod(os.stat)
    lstat = staticmethod(os.lstat)
    mkdir = staticmethod(os.mkdir)
    rename = staticmethod(os.rename)
    unlink = staticmethod(os.unlink)
    statvfs = staticmethod(os.statvfs)
    flock = staticmethod(fcntl.flock)
    distrusted_way = staticmethod(distrusted_way)

    def lock_byte(self, fd: int, kind: int, position: int) -> None:
        """Lock one byte of a file, or end that (``F_UNLCK``); ``BlockingIOError`` for another's lock."""
        command = getattr(fcntl, "F_OFD_SETLK", None)
        if command is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.fcntl(fd, command, struct.pack("hh4xqqi4x", kind, os.SEEK_SET, position, 1, 0))

    def open_read(self, path: str, *, follow: bool = False) -> int:
        """Open for reading; a symbolic link is refused unless ``follow``."""
        # O_NONBLOCK: a FIFO planted under an entry's name must not hang the process.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(path, flags if follow else flags | os.O_NOFOLLOW)

    def open_write(self, path: str) -> int:
        """Open an existing file for reading, writing and exclusive locks."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)

    def create(self, path: str, mode: int = 0o600) -> int:
        """Open a new file; ``FileExistsError`` where the name is taken."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)

    def open_or_create(self, path: str, mode: int = 0o600) -> int:
        """Open a file to lock, made where it is missing; who could read it could hold the lock too."""
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
        # Not by ``suppress``, whose three calls a listing of thousands of files can tell.
        try:
            self.close(fd)
        except OSError:
            pass

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

    def attempt(self, lock: Callable[..., object], *args: Any) -> bool | None:
        """Take a lock without waiting: whether it was had; ``None`` where locks do not work."""
        try:
            lock(*args)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True

    def try_lock(self, fd: int, *, plain: bool = False) -> bool | None:
        """Take an exclusive lock, as :meth:`attempt` tells."""
        # filelock takes a while to import: what every process does is done without it.
        with suppress(OSError):
            if not plain and self.lock(fd):
                return True
        # filelock takes EACCES for another's lock; where it means that locking is forbidden, waiting
        # would never end. So the kernel is asked once more, and says which it is.
        return self.attempt(self.flock, fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

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
        # A prune looks at the file for a moment. Whoever holds a lock for longer must not stop this process.
        had = patiently(lambda: self.attempt(self.flock, fd, fcntl.LOCK_SH | fcntl.LOCK_NB))
        # Where locks do not work, the grace period has to protect the file.
        return had is None or self.same_file(fd, path)


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
