"""Eviction: look, plan, and only then remove. Least recently used entries first, with what only they need.

The order of removal is targets, entry, blobs, pieces: wherever it stops, nothing left leads to what is gone,
but for pieces, whose reading checks. Safe from removal:

- a file whose times changed since the look: it was used, or a put that finished meanwhile may name it;
- a blob that a put under way needs, which holds a lock for it (see ``publish``);
- a temporary file whose writer lives, and so holds a lock on it;
- an entry of which a target is safe;
- a blob that no entry named and that is younger than the grace period: its writer may be a worker that has
  left it for its parent to name. Where locks do not work, all blobs have the grace period.

A start that is loading an entry loses nothing: it has opened the files, and they outlive their names.
"""

from __future__ import annotations

import fcntl
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import field
from functools import partial
from typing import TypeVar

from stitchcache.artifact.entry import Header, decode_piece
from stitchcache.errors import EntryFormatError, FutureFormatError, LockTimeoutError
from stitchcache.records import dataclass
from stitchcache.store import Area
from stitchcache.store.publish import excess, exclusive
from stitchcache.store.root import Item, Root
from stitchcache.store.upkeep import has_entry, led_to, leftovers, open_to_lock, read_header
from stitchcache.words import size_text

T = TypeVar("T")

GRACE_SECONDS = 3600.0
_PATIENCE = 10.0


@dataclass(slots=True, kw_only=True)
class PruneResult:
    """What a prune did."""

    entries: list[str] = field(default_factory=list)  # graph hashes of removed entries
    files: int = 0  # number of removed files, of every kind
    bytes: int = 0  # of the removed files
    in_use: list[str] = field(default_factory=list)  # graph hashes that were to go and were in use
    # Paths that could not be removed, with the system's words.
    failed: list[tuple[str, str]] = field(default_factory=list)
    busy: bool = False  # whether another process was pruning, and nothing was done


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    """What a prune would do. Nothing goes until :meth:`execute`."""

    entries: tuple[tuple[Item, str], ...]  # to evict, least recently used first, with the reason
    blobs: tuple[Item, ...]  # what no remaining entry names
    targets: tuple[Item, ...]  # records that lead to no entry that stays
    pieces: tuple[Item, ...]  # records that name no blob that stays
    leftovers: tuple[Item, ...]  # left in ``tmp`` by processes that died, or beyond the quarantine's cap
    total_bytes: int  # of all files before
    total_files: int  # number of all files before
    # Entries that might be good and cannot be read here, such as those of a newer format. While there are
    # any, no entry and no blob goes.
    unreadable: tuple[str, ...]
    _look: Look = field(repr=False, compare=False)

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
        return self._look.remove(self) if self.items else PruneResult()


def plan_prune(
    look: Look, *, max_bytes: int | None, max_files: int | None, max_age: float | None = None
) -> PrunePlan:
    """Plan what has to go, as :meth:`stitchcache.Cache.plan_prune` tells."""
    entries = [] if look.unreadable else look.may_go
    aged = 0 if max_age is None else sum(look.age(item) > max_age for item in entries)

    def fits(count: int) -> bool:
        going = [*entries[:count], *(item for group in look.with_oldest(count) for item in group)]
        size, number = look.bytes - sum(item.size for item in going), look.files - len(going)
        return (max_bytes is None or size <= max_bytes) and (max_files is None or number <= max_files)

    count = min(bisect_left(range(len(entries) + 1), True, lo=aged, key=fits), len(entries))
    if max_bytes is not None and look.bytes > max_bytes:
        over = f"{size_text(look.bytes)} are over the limit of {size_text(max_bytes)}"
    else:
        over = f"{look.files} files are over the limit of {max_files}"
    reasons = [f"{look.since} {look.age(item) / 86400:.1f} days ago" for item in entries[:aged]]
    return _planned(look, reasons + [over] * (count - aged), look.leftovers())


def plan_removal(roots: Sequence[Root], graph_hashes: Collection[str]) -> PrunePlan:
    """Plan to remove some entries of the first root, whatever their age."""
    look = Look(roots)
    look.entries.sort(key=lambda item: item.key not in graph_hashes)
    return _planned(look, ["named"] * sum(item.key in graph_hashes for item in look.entries))


def _planned(look: Look, reasons: Sequence[str], leftovers: tuple[Item, ...] = ()) -> PrunePlan:
    """The plan in which the first entries go, each for a reason."""
    targets, blobs, pieces = look.with_oldest(len(reasons))
    return PrunePlan(
        entries=tuple(zip(look.entries, reasons, strict=False)),
        blobs=tuple(blobs),
        targets=tuple(targets),
        pieces=tuple(pieces),
        leftovers=leftovers,
        total_bytes=look.bytes,
        total_files=look.files,
        unreadable=look.unreadable,
        _look=look,
    )


def enforce(roots: Sequence[Root], *, max_bytes: int | None, max_files: int | None) -> PruneResult:
    """Plan and prune at once, after waiting a little for whoever is at it."""
    try:
        # Planned under the lock: a plan from before would be about what the other one removed.
        with exclusive(roots[0], "prune", timeout=_PATIENCE):
            return _Removal(plan_prune(Look(roots), max_bytes=max_bytes, max_files=max_files)).done()
    except LockTimeoutError:
        return PruneResult(busy=True)


class Look:
    """The first of some roots as it was seen: its files, and what each names."""

    since = "last used"

    def __init__(self, roots: Sequence[Root], grace: float = GRACE_SECONDS, now: float | None = None) -> None:
        self.roots, self._grace = roots, grace
        self._now = time.time() if now is None else now
        # Blobs before entries: an entry published in between names blobs whose times change then, and a blob
        # published in between is not on the list.
        self._blobs = {item.key: item for item in self.items(Area.BLOBS)}
        targets, self._pieces = list(self.items(Area.TARGETS)), list(self.items(Area.PIECES))
        # The first to go first.
        self.entries = sorted(self.items(Area.ENTRIES), key=lambda item: (item.modified, item.path))
        self.may_go = self.entries
        listed = {Area.TARGETS: targets, Area.PIECES: self._pieces, Area.ENTRIES: self.entries}
        found: dict[Item, list[str] | None] = {}
        for area, items in listed.items():
            found.update(zip(items, self.each(partial(self._names, area), items), strict=True))
        self.named = {item: names or [] for item, names in found.items()}
        self.unreadable = tuple(item.path for item in self.entries if found[item] is None)
        everything = [*self._blobs.values(), *found]
        self.bytes, self.files = sum(item.size for item in everything), len(everything)
        # A piece record under an entry's own hash names what is kept beside it: see ``store.sources``.
        self._beside = {item.key: self.named[item] for item in self._pieces}
        self._ever_named = self._needed(self.entries)
        # Whoever leads to an entry of a layer beneath stays.
        self._targets = [
            item
            for item in targets
            if self.named[item] and not any(has_entry(roots[1:], key) for key in self.named[item])
        ]

    def items(self, area: Area) -> Iterable[Item]:
        """The files of an area."""
        return self.roots[0].items(area)

    def each(self, ask: Callable[[Item], T], items: Sequence[Item]) -> Iterable[T]:
        """Ask something of each of some files."""
        return map(ask, items)

    def header(self, item: Item) -> Header | None:
        """An entry's header; ``None`` where it is gone."""
        return read_header(self.roots[0], item.path)

    def read(self, item: Item, area: Area) -> bytes | None:
        """What is in a target or a piece; likewise."""
        found = self.roots[0].read(item.path, area)
        return None if found is None else found[0]

    def leftovers(self) -> tuple[Item, ...]:
        """What dead processes left, and what is over the cap of the quarantine."""
        return (*leftovers(self.roots[0]), *excess(self.roots[0]))

    def remove(self, plan: PrunePlan) -> PruneResult:
        """Remove what was planned, unless another process is at it."""
        root = self.roots[0]
        try:
            # Where there is no lock, as on a disk that is full, each removal is safe by itself.
            with root.writing(root.path), exclusive(root, "prune", timeout=0):
                return _Removal(plan).done()
        except LockTimeoutError:
            return PruneResult(busy=True)

    def age(self, item: Item) -> float:
        """Seconds since a file's last use."""
        return self._now - item.modified / 1e9

    def is_old(self, item: Item) -> bool:
        """Whether the grace period of a file is over."""
        return self.age(item) >= self._grace

    def with_oldest(self, count: int) -> tuple[list[Item], list[Item], list[Item]]:
        """Targets, blobs and pieces that go when so many entries do: those that nothing else needs."""
        staying = self.entries[count:]
        keys = {item.key for item in staying}
        needed = self._needed(staying)
        targets = [item for item in self._targets if keys.isdisjoint(self.named[item])]
        blobs = [
            item
            for key, item in self._blobs.items()
            if key not in needed and (key in self._ever_named or self.is_old(item)) and not self.unreadable
        ]
        left = self._blobs.keys() - {item.key for item in blobs}
        pieces = [
            item
            for item in self._pieces
            for blob in self.named[item]
            if blob not in left and (blob in self._blobs or self.is_old(item))
        ]
        return targets, blobs, pieces

    def _needed(self, entries: Iterable[Item]) -> set[str]:
        return {name for item in entries for name in (*self.named[item], *self._beside.get(item.key, ()))}

    def _names(self, area: Area, item: Item) -> list[str] | None:
        """What a file names: nothing where it is damaged, ``None`` where it may be good."""
        try:
            if area is Area.ENTRIES:
                header = self.header(item)
                return [] if header is None else [blob.digest for blob in header.blobs]
            found = self.read(item, area)
            if found is None:
                return []
            if area is Area.TARGETS:
                return led_to(found, item)
            return [decode_piece(found, item.key, path=item.path).blob.digest]
        except (FutureFormatError, OSError):
            return None
        except EntryFormatError:
            return []


class _Removal:
    """Removing what was planned, one checked file at a time."""

    def __init__(self, plan: PrunePlan) -> None:
        self._plan, self._look, self._root = plan, plan._look, plan._look.roots[0]
        self._result = PruneResult()
        self._locks: int | None = None

    def done(self) -> PruneResult:
        """Remove everything."""
        with ExitStack() as stack:
            # Where there is no such file, that is as good as no locks.
            with suppress(OSError):
                self._locks = stack.enter_context(self._root.files.opened(self._root.lock_file()))
            self._remove_all()
        return self._result

    def _remove_all(self) -> None:
        plan, named, result = self._plan, self._look.named, self._result
        leading: dict[str, list[Item]] = {}
        evicted = {item.key for item, _ in plan.entries}
        for target in plan.targets:
            keys = evicted.intersection(named[target])
            for key in keys:
                leading.setdefault(key, []).append(target)
            if not keys:
                self._remove(target)
        kept: set[str] = set()
        for item, _ in plan.entries:
            failures = len(result.failed)
            if self._remove(item, leading.get(item.key, ())):
                result.entries.append(item.key)
                continue
            kept.update(named[item])
            if len(result.failed) == failures:
                result.in_use.append(item.key)
        for item in plan.blobs:
            if item.key in kept or not self._remove(item):
                kept.add(item.key)
        for item in (*(each for each in plan.pieces if kept.isdisjoint(named[each])), *plan.leftovers):
            self._remove(item)

    def _remove(self, item: Item, first: Iterable[Item] = ()) -> bool:
        """Remove a file that is unused since the look, after those that lead to it; whether it is gone."""
        try:
            with self._alone_with(item) as alone:
                if not alone or self._root.files.lstat(item.path).st_mtime_ns != item.modified:
                    return False
                if not all(map(self._remove, first)):
                    return False
                try:
                    self._root.files.unlink(item.path)
                except IsADirectoryError:
                    # Not at the top: only what a killed compilation left is a directory.
                    import shutil

                    # It follows no link, also not one that takes the place of a directory meanwhile.
                    shutil.rmtree(item.path)
        except FileNotFoundError:
            return True
        except OSError as error:
            self._result.failed.append((item.path, error.strerror or str(error)))
            return False
        self._result.files += 1
        self._result.bytes += item.size
        return True

    @contextmanager
    def _alone_with(self, item: Item) -> Iterator[bool]:
        """Whether no process has a lock for a file, for the length of a block in which none gets one."""
        root, files = self._root, self._root.files
        area = os.path.relpath(item.path, root.path).partition(os.sep)[0]
        if area in (Area.TMP, Area.LOCKS):
            with files.opened(open_to_lock(files, item.path)) as fd:
                had = files.try_lock(fd)
                yield had is not False and (had or self._look.is_old(item)) and files.same_file(fd, item.path)
        elif area == Area.BLOBS:
            had = None if self._locks is None else root.lock_blob(self._locks, item.key, fcntl.F_WRLCK)
            try:
                yield had is not False and (had or self._look.is_old(item))
            finally:
                if self._locks is not None and had:
                    root.lock_blob(self._locks, item.key, fcntl.F_UNLCK)
        else:
            yield True
