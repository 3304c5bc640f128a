"""Eviction: look, plan, and only then remove. Least recently used entries first, then what nobody names.

Entries go whole. A blob goes when no entry that stays names it. The order of removal is targets, entry,
blobs, piece index: wherever it stops, nothing that is left leads to something that is gone, but for the piece
index, which its reading check.

Safe from removal:

- an entry whose times changed since the scan (it was used), or on which a process holds a shared lock;
- a blob on which a process holds a shared lock: a put under way (see ``publish``);
- a blob whose times changed since the scan: a put that finished meanwhile may name it;
- a blob that no entry named at the scan and that is younger than the grace period: its writer may be a worker
  that has left it for its parent to name. Where locks do not work, all blobs have the grace period.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from stitchcache.errors import LockTimeoutError
from stitchcache.store.files import close_quietly
from stitchcache.store.layout import Area
from stitchcache.store.locks import exclusive, same_file, try_lock
from stitchcache.store.root import Root
from stitchcache.store.scan import Item, Reading, keyed_items, leftovers, legacy_items
from stitchcache.store.verify import excess

GRACE_SECONDS = 3600.0
_PATIENCE = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a root may hold.

    Args:
        max_bytes: Bytes of all files.
        max_files: Number of all files.
        max_age: Seconds since an entry's last use.
        min_free: Bytes that must stay free on the file system.
    """

    max_bytes: int | None = None
    max_files: int | None = None
    max_age: float | None = None
    min_free: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneResult:
    """What a prune did.

    Args:
        entries: Graph hashes of removed entries.
        files: Files removed, of every kind.
        bytes: Their bytes.
        in_use: Graph hashes that were to go and were in use.
        failed: Paths that could not be removed, with the system's words.
        busy: Whether another process was pruning, so that nothing was done.
    """

    entries: tuple[str, ...] = ()
    files: int = 0
    bytes: int = 0
    in_use: tuple[str, ...] = ()
    failed: tuple[tuple[str, str], ...] = ()
    busy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    """What a prune would do. Nothing goes until :meth:`execute`.

    Args:
        entries: Entries to evict, least recently used first, with the reason.
        blobs: Blobs that no remaining entry names.
        targets: Targets none of whose entries stays.
        pieces: Piece files whose blob goes or is gone.
        leftovers: What processes that died left in ``tmp``, and quarantined files beyond the cap.
        total_bytes: Bytes of all files before.
        total_files: Number of all files before.
        unreadable: Entries that might be good and cannot be read here, such as those of a newer format.
            While there are any, no entry and no blob goes.
    """

    entries: tuple[tuple[Item, str], ...]
    blobs: tuple[Item, ...]
    targets: tuple[Item, ...]
    pieces: tuple[Item, ...]
    leftovers: tuple[Item, ...]
    total_bytes: int
    total_files: int
    unreadable: tuple[str, ...]
    _work: _Work = field(repr=False, compare=False)

    @property
    def items(self) -> tuple[Item, ...]:
        """Everything that would go."""
        evicted = tuple(item for item, _ in self.entries)
        return (*self.targets, *evicted, *self.blobs, *self.pieces, *self.leftovers)

    @property
    def bytes(self) -> int:
        """Bytes that would be freed."""
        return sum(item.size for item in self.items)

    @property
    def files(self) -> int:
        """Files that would go."""
        return len(self.items)

    def execute(self) -> PruneResult:
        """Remove what was planned, unless it came into use since. Never raises for a file's sake."""
        return self._work.execute(self)


@dataclass(slots=True)
class _Scan:
    entries: list[Item]
    blobs: dict[str, Item]
    targets: list[tuple[Item, Sequence[str]]]
    pieces: list[tuple[Item, Sequence[str]]]
    names: dict[str, Sequence[str]]
    unreadable: list[str]


def _with_last(
    targets: Iterable[tuple[Item, Sequence[str]]], entries: Sequence[Item]
) -> dict[str, list[Item]]:
    """Graph hash to the targets that go with its entry: a target stays until the last of its entries goes."""
    order = {item.key: place for place, item in enumerate(entries)}
    leading: dict[str, list[Item]] = {}
    for item, keys in targets:
        last = max((key for key in keys if key in order), key=order.__getitem__, default=None)
        if last is not None:
            leading.setdefault(last, []).append(item)
    return leading


class _Work:
    """A plan in the making and in execution.

    Args:
        reading: What is pruned.
        grace: Seconds.
    """

    def __init__(self, reading: Reading, grace: float) -> None:
        self.root = reading.root
        self.reading = reading
        self.grace = grace
        self.now = time.time()
        self.names: dict[str, Sequence[str]] = {}

    def look(self) -> _Scan:
        # Blobs before entries: an entry published in between names blobs whose times change then, and a blob
        # published in between is not on the list.
        blobs = {item.key: item for item in keyed_items(self.root, Area.BLOBS)}
        targets, pieces = (
            [(item, self.reading.leads_to(item, area)) for item in keyed_items(self.root, area)]
            for area in (Area.TARGETS, Area.PIECES)
        )
        entries, names, unreadable = [], {}, []
        for item in (*keyed_items(self.root, Area.ENTRIES), *legacy_items(self.root)):
            named = self.reading.blobs(item)
            entries.append(item)
            if named is None:
                unreadable.append(item.path)
            else:
                names[item.path] = named
        return _Scan(entries, blobs, targets, pieces, names, unreadable)

    def plan(self, limits: Limits) -> PrunePlan:
        seen = self.look()
        self.names = seen.names
        tmp = leftovers(self.root, self.now)
        tmp += [Item(path, path, size, 0, 0) for path, size in excess(self.root)]
        everything = [*seen.entries, *seen.blobs.values()]
        everything += [item for item, _ in (*seen.targets, *seen.pieces)]
        total_bytes = sum(item.size for item in everything)
        evicted = [] if seen.unreadable else self._choose(seen, limits, total_bytes, len(everything))
        gone = {item.path for item, _ in evicted}
        kept_names = {name for path, named in seen.names.items() if path not in gone for name in named}
        named_at_all = {name for named in seen.names.values() for name in named}
        blobs = [
            item
            for item in seen.blobs.values()
            if item.key not in kept_names
            and (item.key in named_at_all or self._is_old(item))
            and not seen.unreadable
        ]
        blob_keys = {item.key for item in blobs}
        kept_entries = {item.key for item in seen.entries if item.path not in gone}
        return PrunePlan(
            entries=tuple(evicted),
            blobs=tuple(blobs),
            targets=tuple(
                item
                for item, keys in seen.targets
                if keys and not any(key in kept_entries or self.reading.entry_beneath(key) for key in keys)
            ),
            pieces=tuple(
                item
                for item, names in seen.pieces
                if any(name in blob_keys or (name not in seen.blobs and self._is_old(item)) for name in names)
            ),
            leftovers=tuple(tmp),
            total_bytes=total_bytes,
            total_files=len(everything),
            unreadable=tuple(seen.unreadable),
            _work=self,
        )

    def _is_old(self, item: Item) -> bool:
        return self.now - item.modified / 1e9 >= self.grace

    def _choose(self, seen: _Scan, limits: Limits, size: int, files: int) -> list[tuple[Item, str]]:
        """Entries to evict, and why."""
        users = Counter(name for named in seen.names.values() for name in named)
        oldest_first = sorted(seen.entries, key=lambda entry: (entry.modified, entry.path))
        leading = _with_last(seen.targets, oldest_first)
        indexed: dict[str, list[Item]] = {}
        for item, names in seen.pieces:
            for name in names:
                indexed.setdefault(name, []).append(item)
        free = self._free(limits)
        evicted = []
        for item in oldest_first:
            if item.path not in seen.names:
                continue
            reason = self._reason(item, limits, size, files, free)
            if reason is None:
                break
            evicted.append((item, reason))
            going = [item, *leading.pop(item.key, [])]
            for name in seen.names[item.path]:
                users[name] -= 1
                if not users[name] and name in seen.blobs:
                    going += [seen.blobs[name], *indexed.get(name, ())]
            freed = sum(each.size for each in going)
            size, files, free = size - freed, files - len(going), None if free is None else free + freed
        return evicted

    def _free(self, limits: Limits) -> int | None:
        if limits.min_free is None:
            return None
        facts = self.root.files.statvfs(self.root.path)
        return facts.f_bavail * facts.f_frsize

    def _reason(self, item: Item, limits: Limits, size: int, files: int, free: int | None) -> str | None:
        age = self.now - item.modified / 1e9
        if limits.max_age is not None and age > limits.max_age:
            return f"not used for {age / 86400:.1f} days"
        if limits.max_bytes is not None and size > limits.max_bytes:
            return f"{size} bytes are over the limit of {limits.max_bytes}"
        if limits.max_files is not None and files > limits.max_files:
            return f"{files} files are over the limit of {limits.max_files}"
        if limits.min_free is not None and free is not None and free < limits.min_free:
            return f"{free} bytes free are under the limit of {limits.min_free}"
        return None

    def execute(self, plan: PrunePlan) -> PruneResult:
        if not plan.items:
            return PruneResult()
        try:
            with _alone(self.root, timeout=0):
                return self.remove(plan)
        except LockTimeoutError:
            return PruneResult(busy=True)

    def remove(self, plan: PrunePlan) -> PruneResult:
        removal = _Removal(self)
        removal.run(plan)
        return removal.result()


@contextmanager
def _alone(root: Root, timeout: float) -> Iterator[None]:
    """Let one process at a time prune a root."""
    with root.writing(root.path):
        pass
    try:
        root.make_dir(root.area(Area.LOCKS))
    except OSError:
        # A full disk has no room for a lock, and pruning is what it needs; each removal is safe by itself.
        yield
        return
    with exclusive(root.files, f"{root.area(Area.LOCKS)}/prune.lock", timeout=timeout):
        yield


class _Removal:
    """Removing, one checked file at a time."""

    def __init__(self, work: _Work) -> None:
        self._work = work
        self._root = work.root
        self._removed: list[Item] = []
        self._entries: list[str] = []
        self._in_use: list[str] = []
        self._failed: list[tuple[str, str]] = []

    def result(self) -> PruneResult:
        return PruneResult(
            entries=tuple(self._entries),
            files=len(self._removed),
            bytes=sum(item.size for item in self._removed),
            in_use=tuple(self._in_use),
            failed=tuple(self._failed),
        )

    def run(self, plan: PrunePlan) -> None:
        reading = self._work.reading
        named = [(item, reading.leads_to(item, Area.TARGETS)) for item in plan.targets]
        leading = _with_last(named, [item for item, _ in plan.entries])
        placed = {item.path for items in leading.values() for item in items}
        stale = [item for item, keys in named if keys and item.path not in placed]
        self._each(stale, self._remove)
        kept: set[str] = set()
        for item, _ in plan.entries:
            if not self._evict(item, leading.get(item.key, ())):
                kept.update(self._work.names.get(item.path, ()))
        for item in plan.blobs:
            if item.key in kept or not self._try(item, self._remove_unheld):
                kept.add(item.key)
        unused = (each for each in plan.pieces if kept.isdisjoint(reading.leads_to(each, Area.PIECES)))
        self._each(unused, self._remove)
        self._each(plan.leftovers, self._remove_leftover)

    def _evict(self, item: Item, targets: Iterable[Item]) -> bool:
        """Remove an entry and what leads to it; whether it is gone."""

        def remove(entry: Item) -> bool:
            if not self._remove_unheld(entry, first=targets):
                self._in_use.append(entry.key)
                return False
            self._entries.append(entry.key)
            return True

        return self._try(item, remove)

    def _each(self, items: Iterable[Item], remove: Callable[[Item], bool]) -> None:
        for item in items:
            self._try(item, remove)

    def _try(self, item: Item, remove: Callable[[Item], bool]) -> bool:
        try:
            return remove(item)
        except OSError as error:
            self._failed.append((item.path, error.strerror or str(error)))
            return False

    def _remove(self, item: Item) -> bool:
        try:
            self._root.files.unlink(item.path)
        except FileNotFoundError:
            return True
        self._removed.append(item)
        return True

    def _remove_unheld(self, item: Item, first: Iterable[Item] = ()) -> bool:
        """Remove a file under an exclusive lock on it, if it is still the one that the scan saw."""
        files = self._root.files
        try:
            fd = files.open_write(item.path)
        except FileNotFoundError:
            return True
        try:
            had = try_lock(files, fd)
            if had is False or (had is None and not self._work._is_old(item)):
                return False
            facts = files.fstat(fd)
            if facts.st_mtime_ns != item.modified or not same_file(files, fd, item.path):
                return False
            self._each(first, self._remove)
            return self._remove(item)
        finally:
            close_quietly(files, fd)

    def _remove_leftover(self, item: Item) -> bool:
        # A lock file goes only under its own lock, lest two processes hold one each.
        is_lock = item.path.startswith(self._root.area(Area.LOCKS))
        return self._remove_unheld(item) if is_lock else self._remove_tree(item)

    def _remove_tree(self, item: Item) -> bool:
        files = self._root.files
        try:
            files.unlink(item.path)
        except FileNotFoundError:
            return True
        except (IsADirectoryError, PermissionError):
            for entry in self._root.scan(item.path):
                self._remove_tree(Item(entry.path, entry.name, 0, 0, 0))
            files.rmdir(item.path)
        self._removed.append(item)
        return True


def plan_prune(reading: Reading, limits: Limits, *, grace_seconds: float = GRACE_SECONDS) -> PrunePlan:
    """Look at a root, and plan what has to go.

    Args:
        reading: What to prune.
        limits: What it may hold.
        grace_seconds: How long a blob that nobody names is left alone.

    Raises:
        OSError: A directory cannot be listed.
    """
    return _Work(reading, grace_seconds).plan(limits)


def enforce(reading: Reading, limits: Limits) -> PruneResult:
    """Plan and prune at once, after waiting a little for whoever is at it.

    Raises:
        OSError: A directory cannot be listed, or the root cannot be written.
    """
    try:
        # Planned under the lock: a plan from before would be about what the other one removed.
        with _alone(reading.root, timeout=_PATIENCE):
            work = _Work(reading, GRACE_SECONDS)
            return work.remove(work.plan(limits))
    except LockTimeoutError:
        return PruneResult(busy=True)
