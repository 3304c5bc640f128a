"""Eviction: look, plan, and only then remove. Least recently used entries first, with what only they need.

The order of removal is targets, entry, blobs, pieces: wherever it stops, nothing left leads to what is
gone, but for pieces, whose reading checks. Safe from removal:

- an entry whose times changed since the look (it was used), or on which a process holds a shared lock;
- a blob on which a process holds a shared lock: a put under way (see ``publish``);
- a blob whose times changed since the look: a put that finished meanwhile may name it;
- a blob that no entry named and that is younger than the grace period: its writer may be a worker that has
  left it for its parent to name. Where locks do not work, all entries and blobs have the grace period.
"""

from __future__ import annotations

import stat
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from stitchcache.artifact.entry import decode_piece
from stitchcache.errors import EntryFormatError, FutureFormatError, LockTimeoutError
from stitchcache.store.files import opened, same_file, try_lock
from stitchcache.store.layout import CAP, Area
from stitchcache.store.publish import excess, exclusive
from stitchcache.store.root import Root
from stitchcache.store.upkeep import Item, has_entry, items, led_to, leftovers, open_to_lock, read_header

GRACE_SECONDS = 3600.0
_PATIENCE = 10.0


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
    _look: _Look = field(repr=False, compare=False)

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
        root = self._look.root
        if not self.items:
            return PruneResult()
        try:
            # Where there is no lock, as on a disk that is full, each removal is safe by itself.
            with root.writing(root.path), exclusive(root, "prune", timeout=0):
                return _Removal(self).run()
        except LockTimeoutError:
            return PruneResult(busy=True)


def plan_prune(
    roots: Sequence[Root],
    *,
    max_bytes: int | None,
    max_files: int | None,
    max_age: float | None = None,
    grace_seconds: float = GRACE_SECONDS,
) -> PrunePlan:
    """Plan what has to go of the first of some roots, as :meth:`stitchcache.Cache.plan_prune` tells."""
    root, look = roots[0], _Look(roots, grace_seconds)
    total_bytes, total_files = sum(item.size for item in look.everything), len(look.everything)
    entries = [] if look.unreadable else look.entries
    aged = 0 if max_age is None else sum(look.age(item) > max_age for item in entries)

    def fits(count: int) -> bool:
        going = [*look.entries[:count], *(item for group in look.with_oldest(count) for item in group)]
        size, number = total_bytes - sum(item.size for item in going), total_files - len(going)
        return (max_bytes is None or size <= max_bytes) and (max_files is None or number <= max_files)

    count = min(bisect_left(range(len(entries) + 1), True, lo=aged, key=fits), len(entries))
    if max_bytes is not None and total_bytes > max_bytes:
        over = f"{total_bytes} bytes are over the limit of {max_bytes}"
    else:
        over = f"{total_files} files are over the limit of {max_files}"
    targets, blobs, pieces = look.with_oldest(count)
    return PrunePlan(
        entries=tuple(
            (item, f"not used for {look.age(item) / 86400:.1f} days" if place < aged else over)
            for place, item in enumerate(entries[:count])
        ),
        blobs=tuple(blobs),
        targets=tuple(targets),
        pieces=tuple(pieces),
        leftovers=(*leftovers(root), *(Item(path, path, size, 0, 0) for path, size in excess(root))),
        total_bytes=total_bytes,
        total_files=total_files,
        unreadable=look.unreadable,
        _look=look,
    )


def enforce(roots: Sequence[Root], *, max_bytes: int | None, max_files: int | None) -> PruneResult:
    """Plan and prune at once, after waiting a little for whoever is at it."""
    try:
        # Planned under the lock: a plan from before would be about what the other one removed.
        with exclusive(roots[0], "prune", timeout=_PATIENCE):
            return _Removal(plan_prune(roots, max_bytes=max_bytes, max_files=max_files)).run()
    except LockTimeoutError:
        return PruneResult(busy=True)


class _Look:
    """A root as it was seen: its files, and what each names."""

    def __init__(self, roots: Sequence[Root], grace: float) -> None:
        self.root = root = roots[0]
        self._beneath = roots[1:]
        self._grace = grace
        self._now = time.time()
        # Blobs before entries: an entry published in between names blobs whose times change then, and a blob
        # published in between is not on the list.
        self.blobs = {item.key: item for item in items(root, Area.BLOBS)}
        self.targets = {item: self._led_to(item) for item in items(root, Area.TARGETS)}
        self.pieces = {item: self._blob_of(item) for item in items(root, Area.PIECES)}
        self.entries = sorted(items(root, Area.ENTRIES), key=lambda item: (item.modified, item.path))
        found = {item: self._named_by(item) for item in self.entries}
        self.named = {item: names or () for item, names in found.items()}
        self.unreadable = tuple(item.path for item, names in found.items() if names is None)
        self.everything = [*self.entries, *self.blobs.values(), *self.targets, *self.pieces]
        self._ever_named = {name for names in self.named.values() for name in names}

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
        needed = {name for item in staying for name in self.named[item]}
        targets = [item for item, led_to in self.targets.items() if led_to and keys.isdisjoint(led_to)]
        blobs = [
            item
            for key, item in self.blobs.items()
            if key not in needed and (key in self._ever_named or self.is_old(item)) and not self.unreadable
        ]
        left = self.blobs.keys() - {item.key for item in blobs}
        pieces = [
            item
            for item, blob in self.pieces.items()
            if blob is not None and blob not in left and (blob in self.blobs or self.is_old(item))
        ]
        return targets, blobs, pieces

    # What cannot be read is left for ``verify``, and names nothing.

    def _led_to(self, item: Item) -> Sequence[str]:
        """Entries that a target leads to; none where a layer beneath has one, so that the target stays."""
        try:
            found = self.root.read(item.path, CAP[Area.TARGETS])
            keys = [] if found is None else led_to(found[0], item)
        except (EntryFormatError, OSError):
            return ()
        return () if any(has_entry(self._beneath, key) for key in keys) else keys

    def _blob_of(self, item: Item) -> str | None:
        """The blob of a piece."""
        try:
            found = self.root.read(item.path, CAP[Area.PIECES])
            return None if found is None else decode_piece(found[0], item.key, path=item.path).blob.digest
        except (EntryFormatError, OSError):
            return None

    def _named_by(self, item: Item) -> Sequence[str] | None:
        """Blobs that an entry names: none for a damaged one, ``None`` for one that may be good."""
        try:
            header = read_header(self.root.files, item.path)
        except (FutureFormatError, OSError):
            return None
        except EntryFormatError:
            return ()
        return () if header is None else [blob.digest for blob in header.blobs]


class _Removal:
    """Removing, one checked file at a time."""

    def __init__(self, plan: PrunePlan) -> None:
        self._plan = plan
        self._look = plan._look
        self._root = plan._look.root
        self._removed: list[Item] = []
        self._entries: list[str] = []
        self._in_use: list[str] = []
        self._failed: list[tuple[str, str]] = []

    def run(self) -> PruneResult:
        plan, look = self._plan, self._look
        evicted = {item.key for item, _ in plan.entries}
        leading: dict[str, list[Item]] = {}
        for target in plan.targets:
            names = evicted.intersection(look.targets[target])
            for name in names:
                leading.setdefault(name, []).append(target)
            if not names:
                self._try(target, self._remove)
        kept: set[str] = set()
        for item, _ in plan.entries:
            if not self._evict(item, leading.get(item.key, ())):
                kept.update(look.named[item])
        for item in plan.blobs:
            if item.key in kept or not self._try(item, self._remove_unheld):
                kept.add(item.key)
        for item in plan.pieces:
            if look.pieces[item] not in kept:
                self._try(item, self._remove)
        quarantined = self._root.area(Area.QUARANTINE)
        for item in plan.leftovers:
            # A quarantined file is nobody's; others may have come into use, as a lock may.
            ours = item.path.startswith(quarantined)
            self._try(item, self._remove if ours else self._remove_unheld)
        return PruneResult(
            entries=tuple(self._entries),
            files=len(self._removed),
            bytes=sum(item.size for item in self._removed),
            in_use=tuple(self._in_use),
            failed=tuple(self._failed),
        )

    def _evict(self, item: Item, targets: Iterable[Item]) -> bool:
        """Remove an entry and what leads to it; whether it is gone."""

        def remove(entry: Item) -> bool:
            gone = self._remove_unheld(entry, targets)
            (self._entries if gone else self._in_use).append(entry.key)
            return gone

        return self._try(item, remove)

    def _try(self, item: Item, remove: Callable[[Item], bool]) -> bool:
        try:
            return remove(item)
        except OSError as error:
            self._failed.append((item.path, error.strerror or str(error)))
            return False

    def _remove_unheld(self, item: Item, first: Iterable[Item] = ()) -> bool:
        """Remove a file under an exclusive lock on it, if it is still the one that the look saw."""
        files = self._root.files
        try:
            fd = open_to_lock(files, item)
        except FileNotFoundError:
            return True
        with opened(files, fd):
            had = try_lock(files, fd)
            if had is False or (had is None and not self._look.is_old(item)):
                return False
            if files.fstat(fd).st_mtime_ns != item.modified or not same_file(files, fd, item.path):
                return False
            for each in first:
                self._try(each, self._remove)
            return self._remove(item)

    def _remove(self, item: Item) -> bool:
        try:
            self._remove_tree(item.path)
        except FileNotFoundError:
            return True
        self._removed.append(item)
        return True

    def _remove_tree(self, path: str) -> None:
        files = self._root.files
        if not stat.S_ISDIR(files.lstat(path).st_mode):
            files.unlink(path)
            return
        for entry in self._root.scan(path):
            self._remove_tree(entry.path)
        files.rmdir(path)
