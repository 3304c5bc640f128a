"""Roots, searched in order, of which the first may be written: blobs, locks and counters.

Damage becomes a miss here. What only writing and upkeep need is imported where it is used.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from stitchcache import errors
from stitchcache.artifact.entry import OUTSIDE, signature_in
from stitchcache.store import (
    REMOTES,
    Area,
    Files,
    Roots,
    check_key,
    flag,
    max_size,
    possible_paths,
    root_paths,
    trust_of,
    words,
)
from stitchcache.store.root import OnWait, Root
from stitchcache.types import BlobRef

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")

_USE_NOTED_EVERY = 3600.0
# Starts that one object holds in memory before it writes them.
_MOST_PENDING = 256
# Bytes that take longer to digest, some six milliseconds, than threads take to start and take turns.
_WORTH_THREADS = 8 << 20


class Store:
    """What needs no knowledge of what an entry says; :class:`stitchcache.Cache` adds that."""

    def __init__(
        self,
        root: Roots | None = None,
        *,
        read_only: bool = False,
        max_bytes: int | None = None,
        max_files: int | None = None,
        durability: Literal["full", "fast"] = "full",
        trust: str | Sequence[str] | None = None,
        remote: str | None = None,
        _files: Files | None = None,
    ) -> None:
        if durability not in ("full", "fast"):
            raise errors.OptionError(f"durability={durability!r}: use 'full' or 'fast'", option="durability")
        for name, value in (("max_bytes", max_bytes), ("max_files", max_files)):
            errors.check_kind(name, value, (int, type(None)), "a whole number")
        self.read_only = read_only or flag("STITCHCACHE_READONLY")
        self.max_bytes = max_size() if max_bytes is None else max_bytes
        self.max_files = max_files
        errors.check_kind("remote", remote, (str, type(None)), "a URL such as 's3://bucket/prefix'")
        self.remote = os.environ.get("STITCHCACHE_REMOTE", "").strip() if remote is None else remote
        if self.remote and not self.remote.startswith(REMOTES):
            raise errors.OptionError(f"remote={self.remote!r}: use {', '.join(REMOTES)}", option="remote")
        self._files = _files or Files()
        paths = root_paths(root)
        root_of = partial(Root, files=self._files, durable=durability == "full")
        self._roots = [
            root_of(path, read_only=self.read_only or index > 0, trust=trusted)
            for index, (path, trusted) in enumerate(zip(paths, trust_of(trust, len(paths)), strict=True))
        ]
        self._top = self._roots[0]
        self._counters = Counters(self._top)
        self._good: dict[str, tuple[int, ...]] = {}
        self._copies: dict[str, Path] = {}
        self._warned: set[str] = set()
        # What was wrong with files that were looked at: path to reason, and cause for the statistics.
        self._problems: dict[str, tuple[str, str]] = {}
        # What was counted since the last put would be lost with the object.
        weakref.finalize(self, self._counters.flush)

    def __repr__(self) -> str:
        return f"Cache({', '.join(self.paths)!r})"

    @property
    def root(self) -> Path:
        """The first root directory, the one that is written."""
        return self.roots[0]

    @property
    def roots(self) -> tuple[Path, ...]:
        """All root directories, in the order they are searched."""
        return tuple(map(_path, self.paths))

    @property
    def paths(self) -> list[str]:
        """The same as text."""
        return [root.path for root in self._roots]

    @property
    def failure(self) -> str:
        """Why the last write that failed did; ``""`` where none has."""
        return self._top.failure

    # -- reading ---------------------------------------------------------------------------------

    def _search(self, area: Area, key: str, look: Callable[[Root, str], T | None]) -> T | None:
        """What the first good file of a key gives; one that cannot be read is warned of."""
        check_key(key)
        untrusted: errors.UntrustedEntryError | None = None
        for root in self._roots:
            for path in possible_paths(root.path, area, key):
                try:
                    value = look(root, path)
                except errors.UntrustedEntryError as error:
                    untrusted = untrusted or error
                except OSError as error:
                    said = f"{path}: cannot be read ({words(error)}): taken as missing"
                    self.warn(path, said, cause="refused")
                else:
                    if value is not None:
                        self._problems.pop(path, None)
                        return value
        if untrusted is not None:
            raise untrusted
        return None

    def _first(
        self,
        area: Area,
        key: str,
        decode: Callable[..., T],
        vouched: Callable[[Root, str, T], T | None] = lambda _root, _path, value: value,
    ) -> T | None:
        """What the first good file of a key holds; a damaged or newer one is warned of.

        ``vouched`` leaves out the parts of it that nobody vouches for.
        """

        def load(root: Root, path: str) -> T | None:
            inode = None
            try:
                found = root.read(path, area, trusted=root.trust == "owner")
                if found is None:
                    return None
                inode = found[1].st_ino
                self._admit(root, path, area, key, found[0])
                value = vouched(root, path, decode(found[0], key, path=path))
            except errors.FutureFormatError as error:
                self.warn(path, error.message)
                return None
            except errors.EntryFormatError as error:
                self._reject(root, path, inode, f"{error.field}: {error.reason}")
                return None
            if not root.read_only and time.time() - found[1].st_mtime > _USE_NOTED_EVERY:
                root.touch(path)
            return value

        return self._search(area, key, load)

    # -- trust -----------------------------------------------------------------------------------

    @cached_property
    def signers(self) -> Any:
        """Who may sign (:class:`stitchcache.store.signed.Signers`)."""
        # As its functions: a start without signatures does without.
        return importlib.import_module("stitchcache.store.signed").Signers()

    @cached_property
    def keys(self) -> Any:
        """What signs (:class:`stitchcache.ext.sign.Keys`), by name as it is an extra."""
        return importlib.import_module("stitchcache.ext.sign").Keys()

    @cached_property
    def tier(self) -> Any:
        """The remote (:class:`stitchcache.remote.tier.Tier`); a start from local files does without it."""
        if not self.remote:
            raise errors.OptionError("no remote: give --remote, or set STITCHCACHE_REMOTE", option="remote")
        return importlib.import_module("stitchcache.remote.tier").Tier(self.remote, self._counters.add)

    def require_voucher(self, backend: str) -> None:
        """Raise ``UntrustedEntryError`` for pieces that are pickles where nobody vouches for files."""
        if backend == "inductor" and any(root.trust == "any" for root in self._roots):
            said = (
                f"{self._top.path}: pieces of backend {backend!r} are pickles, and with trust='any' nobody "
                "vouches for them: use 'owner' or 'signed', or another backend"
            )
            raise errors.UntrustedEntryError(said, path=self._top.path)

    def _admit(
        self, root: Root, path: str, area: Area, key: str, data: bytes, trust: str | None = None
    ) -> None:
        """Raise ``UntrustedEntryError`` for a file that needs a good signature and has none.

        Records of a target are signed one by one, so they are asked later. ``trust`` overrides the root's.
        """
        if area is not Area.TARGETS and needs_signature(trust or root.trust, signature_in(data)):
            from stitchcache.store.signed import require_signed_file

            require_signed_file(self, root.path, path, area, key, data)

    def blob_path(self, ref: BlobRef) -> Path | None:
        """A blob's file, its size and digest checked; ``None`` where it is missing, or damaged.

        To load it, see :meth:`opened`: by this path another file may be found a moment later.

        Raises:
            UntrustedEntryError: It is there, but others can write or exchange it.
        """
        found = self._open_blob(ref)
        if found is None:
            return None
        self._files.close_quietly(found[0])
        return _path(found[1])

    @contextmanager
    def opened(self, refs: Sequence[BlobRef]) -> Iterator[list[Path | None]]:
        """Paths of checked blobs for the length of a block, ``None`` for one that is missing or damaged.

        Each is opened once, and the path leads to that open file, whatever happens to its name.

        Raises:
            UntrustedEntryError: One is there, but others can write or exchange it.
        """
        there = "/proc/self/fd/{}" if os.path.isdir("/proc/self/fd") else ""
        with ExitStack() as stack:

            def open_one(ref: BlobRef) -> Path | None:
                found = self._open_blob(ref)
                if found is None:
                    return None
                stack.callback(self._files.close_quietly, found[0])
                return _path(there.format(found[0]) or found[1])

            if len(refs) < 2 or sum(ref.size for ref in refs) < _WORTH_THREADS:
                yield list(map(open_one, refs))
                return
            # Large ones are digested at one time, on several processors.
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(min(len(refs), os.cpu_count() or 1, 8), "stitchcache-digest") as pool:
                found = list(pool.map(open_one, refs))
            yield found

    def _open_blob(self, ref: BlobRef) -> tuple[int, str] | None:
        """Descriptor and path of a good blob."""

        def check(root: Root, path: str) -> tuple[int, str] | None:
            # Asked every time: a chmod after the first look counts.
            try:
                fd = root.open(path, trusted=root.trust != "any")
            except errors.UntrustedEntryError:
                if root.trust == "owner":
                    raise
                # A signed entry names it by its digest.
                from stitchcache.store.signed import own_copy

                copy = self._copies.get(ref.digest) or own_copy(self, root, path, ref)
                if copy is None:
                    return None
                self._copies[ref.digest] = copy
                return self._files.open_read(str(copy)), str(copy)
            if fd is None:
                return None
            with ExitStack() as refused:
                refused.callback(root.files.close_quietly, fd)
                facts = root.files.fstat(fd)
                # What tells a file, and its state, from every other.
                found = facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
                problem = root.blob_problem(fd, ref) if self._good.get(path) != found else None
                if problem is not None:
                    self._reject(root, path, facts.st_ino, f"blob: {problem}")
                    return None
                self._good[path] = found
                refused.pop_all()
            return fd, path

        return self._search(Area.BLOBS, ref.digest, check)

    def _reject(self, root: Root, path: str, inode: int | None, reason: str) -> None:
        from stitchcache.store.publish import quarantine

        gone = quarantine(root, path, inode, reason)
        what = "moved to quarantine" if gone else "left there, for it cannot be moved"
        self.count("corrupt")
        self.warn(path, f"{path}: damaged: {reason}; {what}, and taken as missing", again=gone)

    def problem(self, key: str) -> tuple[str, str]:
        """Why the last look for a key refused a file, with a miss's ``cause``; ``""`` where it did not."""
        return next((said for path, said in self._problems.items() if key in path), ("", "new"))

    def warn(self, path: str, message: str, *, again: bool = False, cause: str = "entry") -> None:
        """Warn of a file once, and of a root that is not trusted once for all of its files."""
        self._problems[path] = (message, cause)
        said = {path, message.removesuffix(" (taken as missing)")}
        if again or self._warned.isdisjoint(said):
            self._warned |= said
            log("warning", "%s", errors.visible(message))

    # -- writing ---------------------------------------------------------------------------------

    def put_blob(self, source: bytes | str | os.PathLike[str]) -> BlobRef:
        """Store bytes, or those of a file; they are kept until the artifact that names them is put.

        Raises:
            StoreWriteError: The store cannot be written.
        """
        from stitchcache.store.publish import publish_blob

        return publish_blob(self._top, source if isinstance(source, bytes) else os.fspath(source))

    def _hold(self, ref: BlobRef) -> bool:
        """Whether a blob is in a layer; one in the top layer is kept until it is released."""
        from stitchcache.store.publish import hold_blob

        held = not self._top.read_only and hold_blob(self._top, ref)
        return held or any(root.has_blob(ref) for root in self._roots)

    def lock(
        self, key: str, *, timeout: float | None = None, on_wait: OnWait | None = None
    ) -> AbstractContextManager[bool]:
        """Let one process at a time work on a key, for the length of a block.

        The block gets True when the lock is held, and False where locks do not work (a read-only root, some
        network file systems): then the work may be done twice, and that is all.

        Args:
            key: 64 hex digits.
            timeout: Seconds to wait for another process; ``None`` waits as long as it takes.
            on_wait: Called now and then while waiting, with the seconds waited and who holds the lock.

        Raises:
            LockTimeoutError: Another process held it for all that time.
        """
        from stitchcache.store.publish import exclusive

        return exclusive(self._top, check_key(key), timeout=timeout, on_wait=on_wait)

    def scratch(self) -> AbstractContextManager[Path]:
        """A private temporary directory, in the first root where that has room."""
        from stitchcache.store.publish import scratch

        return scratch(self._top)

    # -- counters --------------------------------------------------------------------------------

    def count(self, event: str, amount: int = 1) -> None:
        """Add to a statistic, such as ``hit.direct`` or ``miss.new``; written later, at no cost now."""
        self._counters.add(event, amount)

    def started(self, graph_hash: str, how: str, saved: float, stages: Mapping[str, float]) -> None:
        """Count a start of an entry, and keep the seconds by stage of the last one."""
        self._counters.own()
        self._counters.started.append((graph_hash, how, saved, time.time(), dict(stages)))
        if len(self._counters.started) > _MOST_PENDING:
            self._counters.flush()

    def starts(self) -> dict[str, dict[str, int]]:
        """What was counted of single entries, as ``store.counters.starts_in`` tells."""
        return self._counters.read()[2]

    def counted(self) -> dict[str, int]:
        """What was counted, this process's own included; looks at no entry."""
        return self._counters.read()[0]


def _path(place: str) -> Path:
    # Not at the top, as logging: a command that reads does without, and takes a tenth less.
    from pathlib import Path

    return Path(place)


def log(level: str, text: str, *values: object) -> None:
    """Log a line."""
    # A process without file descriptors cannot import.
    with suppress(OSError, ImportError):
        import logging

        getattr(logging.getLogger("stitchcache"), level)(text, *values)


def needs_signature(trust: str, signature: bytes) -> bool:
    """Whether a signature has to be good: what came from outside is never its owner's word alone."""
    return trust == "signed" or (trust == "owner" and signature.startswith(OUTSIDE))


Start = tuple[str, str, float, float, dict[str, float]]
"""A start of an entry: graph hash, how it came about, seconds saved, Unix time, seconds by stage."""


class Counters:
    """One process's counts, on their way to ``stats/counters`` (``store.counters``).

    What a killed process had not yet written is lost: these are statistics.
    """

    def __init__(self, root: Root) -> None:
        self._root = root
        self._mutex = threading.Lock()
        self._pending: Counter[str] = Counter()
        self.started: list[Start] = []
        self._process = os.getpid()

    def own(self) -> None:
        """Forget what was counted before this process was forked: its parent writes that."""
        if self._process != os.getpid():
            self._process, self._pending, self.started = os.getpid(), Counter(), []

    def add(self, name: str, amount: int = 1) -> None:
        """Count something; ``name`` has no space, quote or ``=``."""
        with self._mutex:
            self.own()
            self._pending[name] += amount

    def read(self) -> tuple[dict[str, int], float, dict[str, dict[str, int]]]:
        """All counts so far, this process's included, since when, and what was counted of single entries."""
        # Not at the top: a warm start counts, and writes at its end.
        from stitchcache.store.counters import SINCE, numbers_in, starts_in, stored_lines

        lines: list[str] = []
        with suppress(OSError):
            lines = stored_lines(self._root)
        counts = Counter(numbers_in(lines, "="))
        with self._mutex:
            counts.update(self._pending)
        since = counts.pop(SINCE, 0)
        return dict(sorted(counts.items())), float(since), starts_in(lines, self.started)

    def flush(self) -> None:
        """Write what was counted. Where that cannot be kept, it is lost."""
        with self._mutex:
            self.own()
            pending, self._pending = self._pending, Counter()
            started, self.started = self.started, []
        if (pending or started) and not self._root.read_only:
            # A process without file descriptors cannot import either.
            with suppress(OSError, ImportError):
                from stitchcache.store.counters import write_counts

                write_counts(self._root, pending, started)
