"""What lies in a root: listing it, reading what its files name, verifying all of it.

Functions raise ``OSError`` where the system refuses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar

from stitchcache import errors
from stitchcache.artifact.entry import (
    MOST_LEGACY,
    Header,
    decode_header,
    decode_named,
    decode_piece,
    decode_target,
    header_end,
)
from stitchcache.records import dataclass
from stitchcache.store import KEYED, LEGACY_SUFFIXES, Area, Files, keyed_path, possible_paths, words
from stitchcache.store.root import Item, Root, host_name
from stitchcache.types import BlobRef

T = TypeVar("T")

_OLD_SECONDS = 86400.0
# Most headers fit: one small read for each entry.
_HEAD_READ = 2048


def leftovers(root: Root) -> list[Item]:
    """What processes that died left in ``tmp``, and locks that nobody holds."""
    # Of another host, and where locks do not work, only the age tells.
    newest = (time.time() - _OLD_SECONDS) * 1e9
    try:
        temporary, locks = list(root.items(Area.TMP)), list(root.items(Area.LOCKS))
    except PermissionError:
        return []  # both are private, and what their owner left is the owner's to remove
    found = [
        item
        for item in temporary
        if item.modified < newest or (item.key.startswith(f"{host_name()}.") and _is_free(root, item))
    ]
    return found + [item for item in locks if item.key.endswith(".lock") and _is_free(root, item)]


def _is_free(root: Root, item: Item) -> bool:
    try:
        with root.files.opened(open_to_lock(root.files, item.path)) as fd:
            return root.files.try_lock(fd) is True
    except OSError:
        return False


def open_to_lock(files: Files, path: str) -> int:
    """Open a file or directory to lock it exclusively."""
    try:
        return files.open_write(path)
    except IsADirectoryError:
        return files.open_read(path)


def read_header(root: Root, path: str) -> Header | None:
    """An entry's header, read without the rest of the file; ``None`` where there is no file."""
    fd = root.open(path)
    if fd is None:
        return None
    files = root.files
    # Not by ``opened``: there may be thousands.
    try:
        facts = files.fstat(fd)
        # Older formats have no header: all of the file is read, and one byte more of one that is too long.
        most = MOST_LEGACY + 1 if path.endswith(LEGACY_SUFFIXES) else _HEAD_READ
        prefix = files.read_exactly(fd, min(facts.st_size, most))
        if most == _HEAD_READ and (rest := header_end(prefix, path=path) - len(prefix)) > 0:
            prefix += files.read_exactly(fd, rest)
    finally:
        files.close_quietly(fd)
    return decode_header(prefix, facts.st_size, path=path, last_used=facts.st_mtime)


def led_to(data: bytes, item: Item) -> list[str]:
    """Graph hashes that a target names."""
    return list(dict.fromkeys(each.graph_hash for each in decode_target(data, item.key, path=item.path)))


def standing(root: Root, area: Area, key: str, decode: Callable[..., T]) -> T | None:
    """What a root's file of a key holds; ``None`` where it is missing or damaged.

    Raises:
        StoreWriteError: A newer stitchcache wrote it, so it must not be replaced.
    """
    path = keyed_path(root.path, area, key)
    try:
        found = root.read(path, area)
        return None if found is None else decode(found[0], key, path=path)
    except errors.FutureFormatError as error:
        # One directory may serve several versions.
        raise errors.StoreWriteError(error.message, path=path, reason=error.reason) from error
    except errors.EntryFormatError:
        return None


def has_entry(roots: Sequence[Root], key: str) -> bool:
    """Whether one of some roots has an entry."""
    paths = ((root, path) for root in roots for path in possible_paths(root.path, Area.ENTRIES, key))
    return any(root.facts(path) is not None for root, path in paths)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """What a cache holds and what it did."""

    counters: Mapping[str, int]  # such as ``hit.direct``, ``miss.<reason>``, ``put`` and ``evicted``
    since: float  # Unix seconds from which on they were counted; 0 where nothing was
    entries: int = 0  # files of this kind, older formats included, as are the next three
    blobs: int = 0
    targets: int = 0
    pieces: int = 0
    files: int = 0  # of these four kinds
    bytes: int = 0  # of these files
    quarantine_files: int = 0  # damaged files that are kept
    quarantine_bytes: int = 0

    def prometheus(self) -> str:
        """The same in Prometheus' text format."""
        lines = [
            "# HELP stitchcache_events_total Events since the first was counted.",
            "# TYPE stitchcache_events_total counter",
        ]
        for name, value in sorted(self.counters.items()):
            label = errors.visible(name).replace("\\", r"\\").replace('"', r"\"")
            lines.append(f'stitchcache_events_total{{event="{label}"}} {value}')
        for name in (*KEYED, "files", "bytes", "quarantine_files", "quarantine_bytes"):
            lines += [f"# TYPE stitchcache_{name} gauge", f"stitchcache_{name} {getattr(self, name)}"]
        return "\n".join(lines) + "\n"


def take_stock(root: Root, counters: Mapping[str, int], since: float, known: Mapping[str, int]) -> CacheStats:
    """Statistics of a root; ``known`` has sizes by path, of files that need no other look."""

    sizes: dict[Area, list[int]] = {}
    for area in (*KEYED, Area.QUARANTINE):
        # Not by ``items``: of thousands of files only the sizes are wanted.
        paths = [path for path, _ in root.names(area)]
        looked = [root.facts(path) for path in paths if path not in known]
        sizes[area] = [known[path] for path in paths if path in known]
        sizes[area] += [facts.st_size for facts in looked if facts is not None]
    quarantined = sizes.pop(Area.QUARANTINE)
    return CacheStats(
        counters=counters,
        since=since,
        files=sum(map(len, sizes.values())),
        bytes=sum(map(sum, sizes.values())),
        quarantine_files=len(quarantined),
        quarantine_bytes=sum(quarantined),
        **{area.value: len(found) for area, found in sizes.items()},
    )


Problem = Literal["damaged", "missing blob", "stale", "untrusted", "newer format", "unreadable", "leftover"]

# A newer stitchcache's files are its own affair, and leftovers are ordinary after a crash.
_HARMLESS = frozenset({"newer format", "leftover"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is not as it should be.

    Where it was ``repaired``, a damaged file or an entry without its blobs went to quarantine, or a pointer
    that led nowhere was removed.
    """

    path: str  # the file
    problem: Problem
    detail: str  # what a person reads
    repaired: bool = False


@dataclass(slots=True, kw_only=True)
class VerifyReport:
    """What a verification saw."""

    entries: int = 0  # files of this kind, as are the next three
    blobs: int = 0
    targets: int = 0
    pieces: int = 0
    bytes: int = 0  # of these files, all of which were read
    findings: tuple[Finding, ...] = ()  # what was wrong

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong that was not repaired."""
        return all(finding.repaired or finding.problem in _HARMLESS for finding in self.findings)


Admit = Callable[[str, Area, str, bytes], None]
"""Raises ``UntrustedEntryError`` for a file that nobody vouches for: its path, area, key and bytes."""


def verify(roots: Sequence[Root], *, repair: bool, admit: Admit) -> VerifyReport:
    """Read everything in the first of some roots; its files may name what the others have."""
    root, walk = roots[0], _Walk(roots, repair, admit)
    # What is named comes before what names it.
    checks = {Area.BLOBS: walk.blob, Area.ENTRIES: walk.entry}
    checks |= {Area.TARGETS: walk.target, Area.PIECES: walk.piece}
    for area, check in checks.items():
        found = list(root.items(area))
        for item in found:
            walk.check(item, check)
        setattr(walk.report, area, len(found))
        walk.report.bytes += sum(item.size for item in found)
    for item in leftovers(root):
        walk.found(item, "leftover", "left by a process that ended; the next prune removes it")
    return walk.report


class _Walk:
    def __init__(self, roots: Sequence[Root], repair: bool, admit: Admit) -> None:
        self.report = VerifyReport()
        self._admit = admit
        self._root = roots[0]
        self._beneath = roots[1:]
        self._repair = repair and not self._root.read_only
        self._blobs: dict[str, int] = {}
        # Entries that are good, and what could not be read and may be good: nothing goes for its sake.
        self._sound: set[str] = set()
        # Of the file that was read last: another one may take its name before it is moved.
        self._inode: int | None = None

    def found(self, item: Item, problem: Problem, detail: str, repaired: bool = False) -> None:
        finding = Finding(path=item.path, problem=problem, detail=detail, repaired=repaired)
        self.report.findings += (finding,)

    def check(self, item: Item, check: Callable[[Item], None]) -> None:
        self._inode = None
        try:
            check(item)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._sound.add(item.key)
            self.found(item, "unreadable", words(error))
        except errors.FutureFormatError as error:
            self._sound.add(item.key)
            self.found(item, "newer format", error.reason)
        except errors.EntryFormatError as error:
            self._set_aside(item, "damaged", f"{error.field}: {error.reason}")

    def blob(self, item: Item) -> None:
        with self._root.files.opened(self._root.files.open_read(item.path)) as fd:
            problem = self._root.blob_problem(fd, BlobRef(digest=item.key, size=item.size))
        if problem is not None:
            self._set_aside(item, "damaged", problem)
            return
        self._blobs[item.key] = item.size
        if self._root.trust == "owner":
            self._note(item, lambda: self._root.require_trust(item.path))

    def entry(self, item: Item) -> None:
        blobs = self._load(item, Area.ENTRIES, lambda data: decode_named(data, item.key, item.path).blobs)
        missing = [blob.digest for blob in blobs if not self._has_blob(blob)]
        if missing:
            detail = f"{len(missing)} of {len(blobs)} blobs are missing or damaged, such as {missing[0]}"
            self._set_aside(item, "missing blob", detail)
        else:
            self._sound.add(item.key)

    def target(self, item: Item) -> None:
        keys = self._load(item, Area.TARGETS, lambda data: led_to(data, item))
        if not any(key in self._sound or has_entry(self._beneath, key) for key in keys):
            self._drop(item, f"its entry {keys[0]} is gone")

    def piece(self, item: Item) -> None:
        blob = self._load(item, Area.PIECES, lambda data: decode_piece(data, item.key, path=item.path).blob)
        if not self._has_blob(blob):
            self._drop(item, f"its blob {blob.digest} is gone")

    def _has_blob(self, ref: BlobRef) -> bool:
        here = ref.digest in self._sound or self._blobs.get(ref.digest) == ref.size
        return here or any(root.has_blob(ref) for root in self._beneath)

    def _load(self, item: Item, area: Area, decode: Callable[[bytes], T]) -> T:
        """What a file says; a ``FileNotFoundError`` where it is gone."""
        found = self._root.read(item.path, area)
        if found is None:
            raise FileNotFoundError(item.path)
        self._inode = found[1].st_ino
        value = decode(found[0])
        self._note(item, lambda: self._admit(item.path, area, item.key, found[0]))
        return value

    def _note(self, item: Item, require_trust: Callable[[], None]) -> None:
        try:
            require_trust()
        except errors.UntrustedEntryError as error:
            self.found(item, "untrusted", error.message)

    def _set_aside(self, item: Item, problem: Problem, detail: str) -> None:
        # Not at the top: what lists a cache does without what writes it.
        from stitchcache.store.publish import quarantine

        done = self._repair and quarantine(self._root, item.path, self._inode, detail)
        self.found(item, problem, detail, done)

    def _drop(self, item: Item, detail: str) -> None:
        if self._repair:
            self._root.files.unlink(item.path)
        self.found(item, "stale", detail, self._repair)
