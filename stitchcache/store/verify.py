"""Going over a whole root, and taking damaged files out of the way.

A damaged file is moved aside, so that the evidence is kept and a good file that came in between is not lost.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from stitchcache.errors import EntryFormatError, FutureFormatError
from stitchcache.store.files import opened, words, write_all
from stitchcache.store.layout import MAX_ENTRY, Area
from stitchcache.store.root import Identity, Root
from stitchcache.store.scan import Item, Name, Reading, keyed_items, leftovers, legacy_items

Problem = Literal["damaged", "missing blob", "stale", "untrusted", "newer format", "unreadable", "leftover"]

# A newer stitchcache's files are its own affair, and leftovers are ordinary after a crash.
_HARMLESS = frozenset({"newer format", "leftover"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is not as it should be.

    Args:
        path: The file.
        problem: Its kind.
        detail: What a person reads.
        repaired: Whether it was put right: damaged files and entries without their blobs go to quarantine,
            pointers that lead nowhere are removed.
    """

    path: str
    problem: Problem
    detail: str
    repaired: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What a verification saw.

    Args:
        entries: Entries looked at.
        blobs: Blobs looked at, every byte of them.
        targets: Targets looked at.
        pieces: Piece files looked at.
        bytes: Bytes read.
        findings: What was wrong.
    """

    entries: int = 0
    blobs: int = 0
    targets: int = 0
    pieces: int = 0
    bytes: int = 0
    findings: tuple[Finding, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong that was not repaired."""
        return all(finding.repaired or finding.problem in _HARMLESS for finding in self.findings)


@dataclass(slots=True)
class _Walk:
    reading: Reading
    repair: bool
    findings: list[Finding] = field(default_factory=list)
    good_blobs: dict[str, int] = field(default_factory=dict)
    good_entries: set[str] = field(default_factory=set)
    unsure: set[str] = field(default_factory=set)
    seen: dict[Area, int] = field(default_factory=dict)
    read: int = 0

    @property
    def root(self) -> Root:
        return self.reading.root

    def count(self, area: Area, item: Item) -> None:
        self.seen[area] = self.seen.get(area, 0) + 1
        self.read += item.size

    def found(self, item: Item, problem: Problem, detail: str, repaired: bool = False) -> None:
        self.findings.append(Finding(path=item.path, problem=problem, detail=detail, repaired=repaired))

    def set_aside(self, item: Item, problem: Problem, detail: str, identity: Identity | None) -> None:
        done = self.repair and quarantine(self.root, item.path, identity, detail)
        self.found(item, problem, detail, done)

    def check_trust(self, item: Item) -> None:
        reason = self.root.distrust(item.path)
        if reason is not None:
            self.found(item, "untrusted", reason)

    def blob(self, item: Item) -> None:
        self.count(Area.BLOBS, item)
        state = self.root.blob_state(item.path, item.key, item.size)
        if isinstance(state, str):
            self.set_aside(item, "damaged", state, None)
        elif state is not None:
            self.good_blobs[item.key] = item.size
            self.check_trust(item)

    def entry(self, item: Item) -> None:
        self.count(Area.ENTRIES, item)
        loaded = self._load(item, Area.ENTRIES)
        if loaded is None:
            return
        named, identity = loaded
        missing = [digest for digest, size in named if not self._has_blob(digest, size)]
        if missing:
            detail = f"{len(missing)} of {len(named)} blobs are missing or damaged, such as {missing[0]}"
            self.set_aside(item, "missing blob", detail, identity)
        else:
            self.good_entries.add(item.key)

    def _has_blob(self, digest: str, size: int) -> bool:
        # What could not be read may be good: nothing is thrown away for its sake.
        if digest in self.unsure:
            return True
        return self.good_blobs.get(digest) == size or self.reading.blob_beneath(digest, size)

    def target(self, item: Item) -> None:
        self.count(Area.TARGETS, item)
        loaded = self._load(item, Area.TARGETS)
        if loaded is not None:
            keys = [key for key, _ in loaded[0]]
            if not any(
                key in self.good_entries or key in self.unsure or self.reading.entry_beneath(key)
                for key in keys
            ):
                self._drop(item, f"its entry {keys[0]} is gone")

    def piece(self, item: Item) -> None:
        self.count(Area.PIECES, item)
        loaded = self._load(item, Area.PIECES)
        if loaded is not None and not self._has_blob(*loaded[0][0]):
            self._drop(item, f"its blob {loaded[0][0][0]} is gone")

    def _load(self, item: Item, area: Area) -> tuple[Sequence[Name], Identity] | None:
        found = None
        try:
            found = self.root.read(item.path, MAX_ENTRY)
            if found is None:
                return None
            value = self.reading.codec.names(area, found.data, item.key, item.path)
        except FutureFormatError as error:
            self.found(item, "newer format", error.reason)
            self.good_entries.add(item.key)
            return None
        except EntryFormatError as error:
            detail = f"{error.field}: {error.reason}"
            self.set_aside(item, "damaged", detail, found.identity if found else None)
            return None
        self.check_trust(item)
        return value, found.identity

    def _drop(self, item: Item, detail: str) -> None:
        if self.repair:
            self.root.files.unlink(item.path)
        self.found(item, "stale", detail, self.repair)

    def each(self, items: Sequence[Item], check: Callable[[Item], None]) -> None:
        for item in items:
            try:
                check(item)
            except FileNotFoundError:
                continue
            except OSError as error:
                self.unsure.add(item.key)
                self.found(item, "unreadable", words(error))


def verify(reading: Reading, *, repair: bool) -> VerifyReport:
    """Read everything in a root.

    Args:
        reading: What to verify.
        repair: Whether to put right what can be.

    Raises:
        OSError: A directory cannot be listed.
    """
    root = reading.root
    walk = _Walk(reading, repair and not root.read_only)
    walk.each(list(keyed_items(root, Area.BLOBS)), walk.blob)
    walk.each([*keyed_items(root, Area.ENTRIES), *legacy_items(root)], walk.entry)
    walk.each(list(keyed_items(root, Area.TARGETS)), walk.target)
    walk.each(list(keyed_items(root, Area.PIECES)), walk.piece)
    for item in leftovers(root, time.time()):
        walk.found(item, "leftover", "left by a process that ended; the next prune removes it")
    return VerifyReport(
        entries=walk.seen.get(Area.ENTRIES, 0),
        blobs=walk.seen.get(Area.BLOBS, 0),
        targets=walk.seen.get(Area.TARGETS, 0),
        pieces=walk.seen.get(Area.PIECES, 0),
        bytes=walk.read,
        findings=tuple(walk.findings),
    )


# -- quarantine ----------------------------------------------------------------------------------

MAX_FILES = 64
MAX_BYTES = 256 << 20
NOTE = ".reason"


def quarantine(root: Root, path: str, identity: Identity | None, reason: str) -> bool:
    """Move a damaged file aside, with a note saying why.

    Args:
        root: Whose it is.
        path: The file.
        identity: Which file was found damaged; one that took its place since is left alone.
        reason: What is wrong with it.

    Returns:
        Whether the name is free now, or has a newer file.
    """
    if root.read_only:
        return False
    aside = os.path.join(root.area(Area.QUARANTINE), f"{os.path.basename(path)}.{os.urandom(4).hex()}")
    try:
        root.make_dir(root.area(Area.QUARANTINE))
        root.files.rename(path, aside)
        if identity is not None and root.files.lstat(aside).st_ino != identity[1]:
            _put_back(root, aside, path)
            return True
    except FileNotFoundError:
        return True
    except OSError:
        return False
    _write_note(root, aside + NOTE, path, reason)
    cap(root)
    return True


def _put_back(root: Root, aside: str, path: str) -> None:
    """Undo: a good one was published in between; but there may be a newer one still."""
    try:
        root.files.link(aside, path)
    except FileExistsError:
        pass
    root.discard(aside)


def _write_note(root: Root, name: str, path: str, reason: str) -> None:
    text = f"{os.path.relpath(path, root.path)}\n{reason}\n".encode("utf-8", "backslashreplace")
    try:
        with opened(root.files, root.files.create(name)) as fd:
            write_all(root.files, fd, text)
    except OSError:
        # The file itself is aside, which is what matters; a full disk may leave no room for the note.
        pass


def excess(root: Root, max_files: int = MAX_FILES, max_bytes: int = MAX_BYTES) -> list[tuple[str, int]]:
    """The oldest quarantined files beyond a number and a size, with their sizes.

    Raises:
        OSError: The quarantine cannot be listed.
    """
    found = []
    for item in root.scan(root.area(Area.QUARANTINE)):
        try:
            facts = root.files.lstat(item.path)
        except FileNotFoundError:
            continue
        found.append((facts.st_ctime_ns, item.path, facts.st_size))
    found.sort(reverse=True)
    surplus, total, count = [], 0, 0
    for _, path, size in found:
        total += size
        count += not path.endswith(NOTE)
        if count > max_files or total > max_bytes:
            surplus.append((path, size))
    return surplus


def cap(root: Root) -> None:
    """Keep the quarantine from growing without end."""
    try:
        for path, _ in excess(root):
            root.discard(path)
    except OSError:
        pass
