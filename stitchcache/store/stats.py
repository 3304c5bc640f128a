"""Counters that cost nothing to collect and outlive processes.

A process adds up in memory and appends one line now and then::

    <crc32, 8 hex digits> <name>=<integer> <name>=<integer> ...

to ``stats/counters``; the sum of all lines is the count. A torn line is left out. Lines are folded into one
when the file has grown. What a killed process had not yet written is lost: these are statistics.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import TYPE_CHECKING

from stitchcache.store.files import close_quietly, opened, read_exactly, write_all
from stitchcache.store.layout import Area
from stitchcache.store.locks import same_file
from stitchcache.store.root import Root

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass


_FOLD_AT = 64 << 10
_LARGEST = 16 << 20
_SINCE = "since"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """What a cache holds and what it did.

    Args:
        counters: Name to number, since ``since``: ``hit.direct``, ``hit.graph``, ``hit.piece``,
            ``compiled``, ``miss.<reason>`` (why there was no direct hit), ``put``, ``put.bytes``,
            ``microseconds.spent``, ``microseconds.saved``, ``corrupt``, ``evicted`` and
            whatever else was counted.
        since: Unix seconds; 0 where nothing was counted yet.
        entries: Entries, older formats included.
        blobs: Distinct blobs.
        targets: Target keys.
        pieces: Piece keys.
        files: Files of these four kinds.
        bytes: Their bytes.
        quarantine_files: Damaged files kept.
        quarantine_bytes: Their bytes.
    """

    counters: Mapping[str, int] = field(default_factory=dict)
    since: float = 0.0
    entries: int = 0
    blobs: int = 0
    targets: int = 0
    pieces: int = 0
    files: int = 0
    bytes: int = 0
    quarantine_files: int = 0
    quarantine_bytes: int = 0

    def prometheus(self) -> str:
        """The same in Prometheus' text format."""
        lines = [
            "# HELP stitchcache_events_total Events since the statistics were zeroed.",
            "# TYPE stitchcache_events_total counter",
        ]
        for name, value in sorted(self.counters.items()):
            label = name.replace("\\", r"\\").replace('"', r"\"")
            lines.append(f'stitchcache_events_total{{event="{label}"}} {value}')
        for name in ("entries", "blobs", "targets", "pieces", "files", "bytes"):
            lines += [f"# TYPE stitchcache_{name} gauge", f"stitchcache_{name} {getattr(self, name)}"]
        for name in ("quarantine_files", "quarantine_bytes"):
            lines += [f"# TYPE stitchcache_{name} gauge", f"stitchcache_{name} {getattr(self, name)}"]
        return "\n".join(lines) + "\n"


class Counters:
    """One process's counts, on their way to the root's file.

    Args:
        root: Where they are kept; a read-only one keeps none.
    """

    def __init__(self, root: Root) -> None:
        self._root = root
        self._mutex = threading.Lock()
        self._pending: Counter[str] = Counter()

    @property
    def path(self) -> str:
        """The file."""
        return os.path.join(self._root.area(Area.STATS), "counters")

    def add(self, name: str, amount: int = 1) -> None:
        """Count something; ``name`` has no space, quote or ``=``."""
        with self._mutex:
            self._pending[name] += amount

    def flush(self) -> None:
        """Append what was counted. Never raises for the file system's sake."""
        with self._mutex:
            pending, self._pending = self._pending, Counter()
        if not pending or self._root.read_only:
            return
        try:
            if self._append(_line(pending)) > _FOLD_AT:
                self._rewrite(lambda counts: counts)
        except OSError:
            # Nowhere to keep them: then they are lost.
            pass

    def read(self) -> tuple[dict[str, int], float]:
        """All counts so far, this process's included, and since when."""
        try:
            found = self._root.read(self.path, _LARGEST)
        except OSError:
            found = None
        counts = _sum(found.data if found else b"")
        with self._mutex:
            counts.update(self._pending)
        since = counts.pop(_SINCE, 0)
        return dict(sorted(counts.items())), float(since)

    def zero(self) -> None:
        """Forget all counts.

        Raises:
            StoreWriteError: The store cannot be written.
        """
        with self._mutex:
            self._pending.clear()
        with self._root.writing(self.path):
            self._root.make_dir(self._root.area(Area.STATS))
            self._rewrite(lambda _counts: Counter({_SINCE: int(time.time())}))

    def _append(self, line: bytes) -> int:
        files = self._root.files
        while True:
            try:
                fd = files.open_append(self.path)
            except FileNotFoundError:
                self._root.make_dir(self._root.area(Area.STATS))
                fd = files.open_append(self.path)
            with opened(files, fd):
                try:
                    files.flock(fd, fcntl.LOCK_SH)
                except OSError:
                    # Without locks a fold may lose this line.
                    pass
                else:
                    if not same_file(files, fd, self.path):
                        continue
                size = files.fstat(fd).st_size
                if size == 0:
                    line = _line(Counter({_SINCE: int(time.time())})) + line
                # One call: appends of different processes do not mix.
                files.write(fd, line)
                return size

    def _rewrite(self, change: Callable[[Counter[str]], Counter[str]]) -> None:
        files, root = self._root.files, self._root
        try:
            fd = files.open_or_create(self.path)
        except FileNotFoundError:
            return
        try:
            # Appenders hold a shared lock for their one call.
            files.flock(fd, fcntl.LOCK_EX)
            if not same_file(files, fd, self.path):
                return
            counts = _sum(read_exactly(files, fd, min(files.fstat(fd).st_size, _LARGEST)))
            new = change(counts)
            temp, temp_fd = root.create_temp()
            try:
                with opened(files, temp_fd):
                    write_all(files, temp_fd, _line(new))
                files.rename(temp, self.path)
            except BaseException:
                root.discard(temp)
                raise
        finally:
            close_quietly(files, fd)


def _line(counts: Counter[str]) -> bytes:
    text = " ".join(f"{name}={value}" for name, value in sorted(counts.items())).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _sum(data: bytes) -> Counter[str]:
    total: Counter[str] = Counter()
    since = []
    for line in data.split(b"\n"):
        checksum, _, text = line.partition(b" ")
        try:
            if not text or int(checksum, 16) != zlib.crc32(text):
                continue
            for item in text.decode().split(" "):
                name, _, value = item.rpartition("=")
                if name == _SINCE:
                    since.append(int(value))
                else:
                    total[name] += int(value)
        except ValueError:
            continue
    if since:
        total[_SINCE] = min(since)
    return total
